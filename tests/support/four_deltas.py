"""Four deltas on each of `models.py`, moved off their initial values."""

from __future__ import annotations

from typing import Any

import torch
from models import ARCHITECTURES
from torch import Tensor, nn

import deltaspec
from deltaspec.backbone.inputs import call_arguments
from deltaspec.compiler.compiled import CompiledModel
from deltaspec.contract.trial import floats

LINEARS = {"gpt2": {"type": "Conv1D"}}


def spec(architecture: str = "traceable-modules") -> dict[str, Any]:
    linear = LINEARS.get(architecture, {"type": "Linear"})
    return {
        "deltaspec": 1,
        "deltas": [
            {"name": "norms", "method": "full", "target": {"type": "LayerNorm", "optional": True}},
            {"name": "low", "method": "lora", "params": {"rank": 2, "dropout": 0.1}, "target": linear},
            {"name": "wide", "method": "adapter", "params": {"width": 3}, "target": linear},
            {"name": "bias", "method": "bitfit", "target": linear, "attached": False},
        ],
    }


def build(architecture: str = "traceable-modules", model: nn.Module | None = None) -> CompiledModel:
    chosen = ARCHITECTURES[architecture]
    compiled = deltaspec.compile(
        model or chosen.model(), spec(architecture), capture=chosen.capture, example_inputs=chosen.inputs()
    )
    disturb(compiled)
    return compiled


@torch.no_grad()
def disturb(compiled: CompiledModel, number: int = 1) -> None:
    generator = torch.Generator().manual_seed(number)
    for delta in compiled.deltas.values():
        for parameter in delta.parameters():
            parameter.add_((torch.randn(parameter.shape, generator=generator) * 0.1).to(parameter))


@torch.no_grad()
def run(model: nn.Module, architecture: str = "traceable-modules") -> list[Tensor]:
    args, kwargs = call_arguments(ARCHITECTURES[architecture].inputs())
    return floats(model(*args, **kwargs))
