"""The backbone's own dropouts, which keep their masks in bits: torch's keep floats on a CPU, and bytes elsewhere."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from deltaspec.graphs.bits import packed, unpacked
from deltaspec.graphs.modes import is_rewritten

FEW = 1 << 17
"""Values below which autograd's own step is faster than one in Python (measured)."""


def drop(run: Callable[[Tensor], Tensor], module: nn.Dropout, x: Tensor) -> Tensor:
    """Run a dropout, whose own forward is `run`, with the same random numbers."""
    if (
        not module.training
        or not torch.is_grad_enabled()
        or type(x) is not Tensor
        or not x.requires_grad
        or is_rewritten()
        or x.numel() < FEW
        or not 0 < module.p < 1
        or module.inplace
    ):
        return run(x)
    y: Tensor = DropStep.apply(x, module.p)  # type: ignore[no-untyped-call]
    return y


class DropStep(torch.autograd.Function):
    """Dropout. Its inputs: (x, the probability of dropping a value)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, p: float) -> Tensor:
        """Drop."""
        y, mask = torch.native_dropout(x, p, True)
        ctx.shape, ctx.scale = x.shape, 1 / (1 - p)
        ctx.save_for_backward(packed(mask.contiguous()))
        return y

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        """Drop the same of the gradient."""
        return dropped(gradient, ctx.saved_tensors[0], ctx.shape, ctx.scale), None


def dropped(x: Tensor, bits: Tensor, shape: torch.Size, scale: float) -> Tensor:
    """Drop what was dropped once."""
    return x * unpacked(bits, shape).to(x.dtype).mul_(scale)
