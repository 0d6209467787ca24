"""A LoRA and an adapter on each of the transformers of `models.py`."""

from __future__ import annotations

from typing import Any

import torch
from models import ARCHITECTURES
from torch import Tensor, nn

import deltaspec
from deltaspec.compiler.compiled import CompiledModel

DELTAS = {
    "bert": {"role": ["attn.q", "attn.v"]},
    "gpt2": {"role": "attn.qkv"},
    "llama": {"role": ["attn.q", "attn.v"]},
    "t5": {"role": ["attn.q", "attn.v"]},
    "bart": {"role": ["attn.q", "attn.v"]},
    "vit": {"role": ["attn.q", "attn.v"]},
}


def spec(architecture: str, dropout: float = 0.0) -> dict[str, Any]:
    return {
        "deltaspec": 1,
        "deltas": [
            {
                "name": "low",
                "method": "lora",
                "params": {"rank": 2, "dropout": dropout},
                "target": DELTAS[architecture],
            },
            {"name": "wide", "method": "adapter", "params": {"width": 3}, "target": {"role": "block"}},
        ],
    }


def build(architecture: str, model: nn.Module | None = None, **rest: Any) -> CompiledModel:
    """Compile both deltas and move them off their initial values."""
    compiled = deltaspec.compile(model or ARCHITECTURES[architecture].model(), spec(architecture, **rest))
    disturb(compiled)
    return compiled


@torch.no_grad()
def disturb(compiled: CompiledModel, size: float = 0.1) -> None:
    generator = torch.Generator().manual_seed(3)
    for delta in compiled.deltas.values():
        for parameter in delta.parameters():
            parameter.add_((torch.randn(parameter.shape, generator=generator) * size).to(parameter))


@torch.no_grad()
def logits(model: Any, architecture: str, **rest: Any) -> Tensor:
    return model(**ARCHITECTURES[architecture].inputs(), **rest).logits
