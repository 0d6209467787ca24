"""Five deltas that meet on many sites of each of `models.py`."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from models import ARCHITECTURES
from torch import Tensor, nn

from deltaspec.backbone.inputs import call_arguments
from deltaspec.compiler.compile import compile_plan
from deltaspec.compiler.compiled import CompiledModel
from deltaspec.contract.trial import floats
from deltaspec.planning.plan import Plan
from deltaspec.planning.resolve import plan

NAMES = ("norms", "low", "wide", "bias", "spare")
TARGETS: dict[str, dict[str, Any]] = {
    "bert": {
        "norms": {"role": "norm"},
        "low": {"role": ["attn.q", "attn.v"]},
        "wide": {"role": "block"},
        "bias": {"role": "mlp.up"},
    },
    "gpt2": {
        "norms": {"role": "norm"},
        "low": {"role": ["attn.qkv", "mlp.up"]},
        "wide": {"role": "attn"},
        "bias": {"role": "mlp.up"},
    },
    "t5": {
        "norms": {"role": "norm"},
        "low": {"role": ["attn.q", "mlp.down"]},
        "wide": {"role": "block"},
        "bias": {"role": "attn.o"},
    },
    "branching": {"norms": "norm", "low": ["block.*", "embed"], "wide": "block.down", "bias": ["block.up", "head"]},
    "traceable-modules": {"norms": ["bn", "norm"], "low": ["conv", "up"], "wide": "up", "bias": ["conv", "bn"]},
    "traceable-symbolic": {"norms": ["bn", "norm"], "low": ["conv", "up"], "wide": "up", "bias": ["conv", "bn"]},
}


def spec(architecture: str) -> dict[str, Any]:
    """Five deltas that meet on many sites, of four methods; the last starts detached."""
    where = TARGETS[architecture]
    return {
        "deltaspec": 1,
        "deltas": [
            {"name": "norms", "method": "full", "target": where["norms"]},
            {"name": "low", "method": "lora", "params": {"rank": 2, "dropout": 0.1}, "target": where["low"]},
            {"name": "wide", "method": "adapter", "params": {"width": 3}, "target": where["wide"]},
            {"name": "bias", "method": "bitfit", "target": where["bias"]},
            {"name": "spare", "method": "lora", "params": {"rank": 3}, "target": where["low"], "attached": False},
        ],
    }


@cache
def planned(architecture: str) -> tuple[nn.Module, Any, Plan]:
    chosen = ARCHITECTURES[architecture]
    model, inputs = chosen.model(), chosen.inputs()
    return model, inputs, plan(model, spec(architecture), example_inputs=inputs)


def build(architecture: str) -> CompiledModel:
    model, _, made = planned(architecture)
    compiled = compile_plan(model, made, ARCHITECTURES[architecture].capture)
    move(compiled, 5)
    return compiled


@torch.no_grad()
def move(compiled: CompiledModel, number: int) -> None:
    """Change all delta tensors, the same way for the same number."""
    generator = torch.Generator().manual_seed(number)
    for delta in compiled.deltas.values():
        for parameter in delta.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)


@torch.no_grad()
def outputs(model: nn.Module, inputs: Any) -> list[Tensor]:
    """Run in evaluation mode, then go back to the mode that the model was in."""
    args, kwargs = call_arguments(inputs)
    mode = model.training
    result = floats(model.eval()(*args, **kwargs))
    model.train(mode)
    return result
