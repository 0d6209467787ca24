"""Deltas off their initial values, as training leaves them."""

from __future__ import annotations

import torch

from deltaspec.compiler.compiled import CompiledModel


@torch.no_grad()
def moved(compiled: CompiledModel, number: int = 1) -> CompiledModel:
    """Change all tensors of all deltas, the same way for the same number."""
    generator = torch.Generator().manual_seed(number)
    for delta in compiled.deltas.values():
        for parameter in delta.parameters():
            parameter.add_((torch.randn(parameter.shape, generator=generator) * 0.1).to(parameter))
    return compiled
