"""Functions that the formulas of mixed batches call: each row's own tensors, and rows in and out of a hidden state."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

from deltaspec.diagnostics.findings import DeltaSpecError, Diagnostic


class RowBatch(Protocol):
    """The batch that runs now."""

    rows: int
    size: int
    totals: tuple[int, ...]
    images: bool


class RowSlot(Protocol):
    """The deltas of a batch's rows at one place in the order of application: data that a graph reads."""

    @property
    def batch(self) -> RowBatch:
        """The batch that runs now."""

    @property
    def partial(self) -> bool:
        """Whether some row is under its delta at another strength than its full one."""

    def strengths_like(self, x: Tensor) -> Tensor:
        """Return the strengths in the form of a tensor."""


class RowSource(Protocol):
    """One tensor of the deltas of a kind."""

    def take(self, slot: Any, size: int, zeros: bool) -> Tensor:
        """Return the tensor of each row's delta."""

    def take_briefly(self, slot: Any, size: int) -> Tensor:
        """Return the tensor of each row's delta, until the next call."""


def take(slot: RowSlot, source: RowSource, x: Tensor, zeros: bool) -> Tensor:
    """Return the tensor of the delta of each row of `x`; zeros, or another row's, where a row has none."""
    return source.take(slot, x.shape[0], zeros)


def rows_in(slot: RowSlot, x: Tensor) -> Tensor:
    """Return a hidden state with its rows as first dimension.

    `x` is `[rows, …]` (times the beams), `[1, …]` for all rows, or the tokens of all rows, `[rows * tokens, width]`.
    What has two dimensions becomes `[rows, tokens, width]`: a row by itself then has as many as it has in a batch.
    Raises DeltaSpecError (DS442) where the rows cannot be told apart.
    """
    size, batch = x.shape[0] if x.dim() else 1, slot.batch
    if x.dim() == 2 and x.is_floating_point():
        if size == 1:
            x, size = x.expand(batch.size, -1), batch.size
        if size == batch.size or size in batch.totals:
            return x.reshape(batch.size, size // batch.size, x.shape[-1])
    elif size == batch.size or (size % batch.size == 0 and batch.images):
        return x
    elif size == 1:
        return x.expand(batch.size, *x.shape[1:])
    message = (
        f"a hidden state {list(x.shape)} does not tell the {batch.rows} rows of the batch apart, "
        "so they cannot be under different deltas here"
    )
    hint = "run these rows one delta at a time: with c.only(name)"
    raise DeltaSpecError([Diagnostic("DS442", message, suggestion=hint)])


def rows_out(like: Tensor, x: Tensor) -> Tensor:
    """Undo what `rows_in` did to tokens: `like` is what came in."""
    return x.flatten(0, 1) if x.dim() > like.dim() else x


def toward(without: Tensor, with_it: Tensor, strength: Tensor) -> Tensor:
    """Go from what is without a delta to what is with it: exactly the one at strength 0, the other at 1."""
    return torch.lerp(without.to(with_it.dtype), with_it, strength.to(with_it.dtype))


def toward_rows(without: Tensor, with_it: Tensor, slot: RowSlot) -> Tensor:
    """Go, row by row, from what is without a delta to what is with it: exactly the one at strength 0."""
    return torch.lerp(without.to(with_it.dtype), with_it, slot.strengths_like(with_it))


def align(values: Tensor, like: Tensor) -> Tensor:
    """Shape `[rows, …]` values of fewer dimensions so that they broadcast over `like`, the last dimensions aligned."""
    more = like.dim() - values.dim()
    return values.reshape(values.shape[0], *(1,) * more, *values.shape[1:]) if more > 0 else values


def linear_rows(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Multiply `[rows, …, in]` by `[rows, out, in]`, row by row; the bias is `[rows, out]`."""
    if x.dim() == 3:
        y = torch.bmm(x, weight.mT)
    else:
        tokens = x.flatten(1, -2) if x.dim() > 2 else x.unsqueeze(1)
        y = torch.bmm(tokens, weight.mT).reshape(*x.shape[:-1], weight.shape[1])
    return y if bias is None else y + align(bias, y)


def add_linear_rows(y: Tensor, x: Tensor, weight: Tensor, slot: RowSlot, scale: float = 1.0) -> Tensor:
    """Add, row by row, strength · scale · x Wᵀ to y. `x` is narrow, so the strength is applied to it."""
    scaled = x * slot.strengths_like(x) if slot.partial else x
    if torch.compiler.is_compiling():  # they lose an `alpha`: see `passes/keep_scales.py`
        return y + linear_rows(scaled * scale, weight)
    if y.dim() == 3 and x.dim() == 3:
        added = torch.baddbmm(y, scaled, weight.mT, alpha=scale)
        if added.dtype is y.dtype:  # not so under autocast
            return added
    return torch.add(y, linear_rows(scaled, weight), alpha=scale)
