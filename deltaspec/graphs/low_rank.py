"""A linear host with a low-rank update as one step of autograd, which keeps less than its parts and takes less time.

y = W x + b + scale · up (down drop(x)), with W and b frozen. It keeps `x`, or what that is made of again (see
`recipes.py`), the narrow product and the bits of the dropout's mask; autograd's own steps would keep what was left by
the dropout, and its mask in floats. Gradients are added to the one product that is as wide as the input, and each
narrow product is taken in the order that is fastest.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from deltaspec.graphs.autocast import autocasts, without_autocast
from deltaspec.graphs.bits import packed, unpacked
from deltaspec.graphs.modes import is_watched
from deltaspec.graphs.recipe_steps import Steps, make
from deltaspec.graphs.remade import Remade

MANY = 32
"""Rows from which the narrow product is faster as `down xᵀ` than as `x downᵀ` (measured with MKL, float32)."""
PAYS = 2
"""How many times dearer a value of the merged weight is than one of the two wide additions it saves (measured)."""


class Step(NamedTuple):
    """What the step is given besides tensors that get gradients."""

    base: Callable[[Tensor], Tensor]
    """Runs the host."""
    weight: Tensor
    """The host's weight, `[out, in]`."""
    bias: Tensor | None
    scale: float
    dropout: float
    """Probability of dropping a value; 0 where nothing is dropped."""
    dtype: torch.dtype
    """What products are taken in: the inputs' own dtype, or autocast's."""
    steps: Steps | None = None
    """How `x` is made again; None where it is kept."""
    kept: tuple[Tensor, ...] = ()
    """What it is made of."""
    shared: Remade | None = None


class LowRankStep(torch.autograd.Function):
    """The step. Its inputs: (what it is, x, down, up)."""

    @staticmethod
    def forward(ctx: Any, step: Step, x: Tensor, down: Tensor, up: Tensor) -> Tensor:
        """Run the host and add the update to what it gives: `[…, in]` to `[…, out]`."""
        narrow = bits = None
        first, second = down.to(step.dtype), up.to(step.dtype)
        merges = not step.dropout and merging_pays(x, first, second)
        if merges:
            y = F.linear(x, merged(step.weight, first, second, step.scale), step.bias)
        else:
            y, entering = step.base(x), x.to(step.dtype)
            if step.dropout:
                entering, mask = torch.native_dropout(entering, step.dropout, True)
                bits = packed(mask.reshape(-1, x.size(-1)).contiguous())
            rows = entering.reshape(-1, x.size(-1))
            narrow = first.mm(rows.t()) if rows.size(0) >= MANY else rows.mm(first.t()).t()
            add = torch.addmm if is_watched() else Tensor.addmm_
            y = add(y.view(-1, y.size(-1)), narrow.t(), second.t(), alpha=step.scale).view(y.shape)
        ctx.merged, ctx.shape, ctx.dtype = merges, x.shape, x.dtype
        ctx.scale, ctx.dropout, ctx.steps, ctx.shared = step.scale, step.dropout, step.steps, step.shared
        weight = step.weight if ctx.needs_input_grad[1] else None
        ctx.save_for_backward(weight, down, up, narrow, bits, *(step.kept or (x,)))
        left: Tensor = _unsafe_view(y, y.shape)  # a view, as a product of three dimensions is, could not be overwritten
        return left

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        """Return the gradients of the inputs. It can be differentiated again."""
        if not autocasts(gradient.device):
            return _gradients(ctx, gradient)
        with without_autocast(gradient.device):
            return _gradients(ctx, gradient)


def _gradients(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    weight, down, up, narrow, bits, *kept = ctx.saved_tensors
    _, to_x, to_down, to_up = ctx.needs_input_grad
    again = torch.is_grad_enabled()
    gradients = gradient.reshape(-1, gradient.size(-1))
    first, second = down.to(gradient.dtype), up.to(gradient.dtype)

    rows = None
    if to_down or (to_up and (narrow is None or again)):
        rows = _entered(ctx, kept, again).to(gradient.dtype).reshape(-1, down.size(1))
    noise = None
    if bits is not None:
        mask = unpacked(bits, torch.Size((gradients.size(0), down.size(1))))
        noise = mask.to(gradient.dtype).mul_(1 / (1 - ctx.dropout))
        rows = rows if rows is None else rows * noise

    small = second.t().mm(gradients.t()) if to_down or (to_x and not ctx.merged) else None
    for_down = for_up = for_x = None
    if to_down:
        assert small is not None and rows is not None
        for_down = small.mm(rows).mul(ctx.scale).to(down.dtype)
    if to_up:
        if narrow is None or again:  # what was kept is a constant
            assert rows is not None
            narrow = first.mm(rows.t())
        for_up = narrow.mm(gradients).t().mul(ctx.scale).to(up.dtype)
    if to_x and ctx.merged:
        for_x = gradients.mm(merged(weight.to(gradient.dtype), first, second, ctx.scale))
    elif to_x:
        assert small is not None
        for_x = gradients.mm(weight.to(gradient.dtype))
        if noise is None:
            for_x = for_x.addmm_(small.t(), first, alpha=ctx.scale)
        else:
            for_x = for_x.addcmul_(small.t().mm(first), noise, value=ctx.scale)
    if for_x is not None:
        for_x = for_x.view(ctx.shape).to(ctx.dtype)
    return None, for_x, for_down, for_up


def _entered(ctx: Any, kept: Sequence[Tensor], again: bool) -> Tensor:
    """Return what entered the host."""
    if ctx.steps is None:
        return kept[0]
    found: Tensor = make(ctx.steps, tuple(kept)) if again else ctx.shared.get(ctx.steps, tuple(kept))
    return found


def merging_pays(x: Tensor, down: Tensor, up: Tensor) -> bool:
    """Return whether one product with W + scale · up down is cheaper than that with W and two narrow ones.

    Half precision would lose the update beside the weight. Otherwise the sum is as exact as that of the outputs. (The
    choice is RunLoRA's, arXiv:2312.03415: `benchmarks/training.py` has the table.)
    """
    if x.dtype not in _EXACT or down.dtype is not x.dtype:
        return False
    inner, outer = down.size(1), up.size(0)
    return x.numel() // inner * (inner + outer) > PAYS * inner * outer


_unsafe_view = torch.ops.aten._unsafe_view.default  # noqa: SLF001  # as torch's own products end
_EXACT = (torch.float32, torch.float64)


def merged(weight: Tensor, down: Tensor, up: Tensor, scale: float) -> Tensor:
    """Return W + scale · up down."""
    return torch.addmm(weight, up, down, alpha=scale)
