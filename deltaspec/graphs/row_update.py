"""The low-rank update of a mixed batch under autograd: each delta's rows by themselves, on its own tensors.

Nothing is gathered and nothing is padded: a product a delta, as if it trained alone. What is kept for the backward is
the input, and values of the ranks' size; the gradient of each tensor is made in its own shape.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

Runs = tuple[tuple[int, int, int, float], ...]
"""Neighbouring rows under one delta: begin, end, place among the deltas from 1 (0: none), factor of its update."""


class RowUpdate(torch.autograd.Function):
    """y + factor · (x downᵀ) upᵀ, row by row. `y` is `[rows, tokens, out]`, `x` `[rows, tokens, in]`."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, x: Tensor, runs: Runs, *matrices: Tensor) -> Tensor:
        """Compute it; `matrices` are the deltas' `down`s `[rank, in]`, and then their `up`s `[out, rank]`."""
        count = len(matrices) // 2
        leaving, narrow = torch.empty_like(y, memory_format=torch.contiguous_format), []
        for (_, _, place, factor), before, after, entered in zip(
            runs, *(_pieces(tensor, runs) for tensor in (y, leaving, x)), strict=True
        ):
            if not place:
                after.copy_(before)
                continue
            h = entered.mm(matrices[place - 1].t()).mul_(factor)
            narrow.append(h)
            torch.addmm(before, h, matrices[count + place - 1].t(), out=after)
        ctx.runs = runs
        ctx.save_for_backward(x, *matrices, *narrow)
        return leaving

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        """Return the gradients of y, x and the matrices."""
        [gradient] = gradients
        saved, needed, runs = ctx.saved_tensors, ctx.needs_input_grad, ctx.runs
        count = (len(needed) - 3) // 2
        x, matrices, narrow = saved[0], saved[1 : 1 + 2 * count], iter(saved[1 + 2 * count :])
        if torch.is_grad_enabled():
            return (gradient, *_differentiable(gradient, x, runs, matrices))
        of_x = torch.empty_like(x, memory_format=torch.contiguous_format) if needed[1] else None
        found: list[Tensor | None] = [None] * (2 * count)
        entering = runs if of_x is None else _pieces(of_x, runs)
        for (_, _, place, factor), given, entered, rows in zip(
            runs, _pieces(gradient, runs), _pieces(x, runs), entering, strict=True
        ):
            if not place:
                if of_x is not None:
                    rows.zero_()
                continue
            h, down, up = next(narrow), place - 1, count + place - 1
            if needed[3 + up]:
                found[up] = _added(found[up], given.t(), h)
            if not (needed[3 + down] or needed[1]):
                continue
            of_h = given.mm(matrices[up]).mul_(factor)
            if needed[3 + down]:
                found[down] = _added(found[down], of_h.t(), entered)
            if of_x is not None:
                torch.mm(of_h, matrices[down], out=rows)
        return (gradient if needed[0] else None, of_x, None, *found)


def _pieces(x: Tensor, runs: Runs) -> tuple[Tensor, ...]:
    """Return the tokens of each run, `[tokens, width]`."""
    tokens = x.shape[1]
    found: tuple[Tensor, ...] = torch.split(x.flatten(0, 1), [(end - begin) * tokens for begin, end, *_ in runs])
    return found


def _added(before: Tensor | None, one: Tensor, other: Tensor) -> Tensor:
    return one.mm(other) if before is None else before.addmm_(one, other)  # rows of one delta may stand apart


def _differentiable(gradient: Tensor, x: Tensor, runs: Runs, matrices: tuple[Tensor, ...]) -> list[Tensor | None]:
    """Return the gradients of x and the matrices as functions of all of them, for a backward through the backward."""
    count, of_x = len(matrices) // 2, []
    found: list[Tensor | None] = [None] * (2 * count)
    for begin, end, place, factor in runs:
        if not place:
            of_x.append(torch.zeros_like(x[begin:end]))
            continue
        down, up = matrices[place - 1], matrices[count + place - 1]
        given, entered = gradient[begin:end].flatten(0, 1) * factor, x[begin:end].flatten(0, 1)
        of_h = given @ up
        own = {count + place - 1: given.t() @ (entered @ down.t()), place - 1: of_h.t() @ entered}
        for at, value in own.items():
            before = found[at]
            found[at] = value if before is None else before + value
        of_x.append((of_h @ down).view(end - begin, *x.shape[1:]))
    return [torch.cat(of_x), None, *found]
