"""Functions that the formulas of mixed batches call: each row's own tensors, and rows in and out of a hidden state."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

from deltaspec.diagnostics.findings import DeltaSpecError, Diagnostic
from deltaspec.graphs.links import like


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
    def empty(self) -> bool:
        """Whether no row has a delta here, where that is known."""

    def is_various(self, size: int) -> bool:
        """Return whether so many rows have matrices of several sizes, or few deltas."""

    def runs(self, size: int) -> tuple[tuple[int, int, int, float], ...]:
        """Return neighbours that are under one delta, of so many rows: (begin, end, place of it, strength)."""

    @property
    def partial(self) -> bool:
        """Whether some row is under its delta at another strength than its full one."""

    def strengths_like(self, x: Tensor) -> Tensor:
        """Return the strengths in the form of a tensor."""

    def holds_like(self, x: Tensor) -> Tensor:
        """Return whether rows have a delta here, in the form of a tensor."""


class RowNumber(Protocol):
    """A factor in a formula, which the rows' deltas may have at different values."""

    def of(self, slot: Any) -> float | None:
        """Return it where it is the same for all rows."""

    def take(self, slot: Any, x: Tensor) -> Tensor:
        """Return that of each row of a tensor, `[rows]`, in its dtype."""

    def like(self, slot: Any, x: Tensor, wide: bool = False) -> Tensor:
        """Return that of each row, `[rows, 1, …]`, for a tensor `[rows, …]`; `wide`, not rounded to a narrow dtype."""

    def each(self, slot: Any) -> list[float]:
        """Return that of each of the slot's deltas."""


class RowSource(Protocol):
    """One tensor of the deltas of a slot, padded with zeros where those of other rows are larger."""

    def take(self, slot: Any, size: int, zeros: bool) -> Tensor:
        """Return the tensor of each row's delta."""

    def own(self, slot: Any) -> list[Tensor]:
        """Return the tensor of each of the slot's deltas."""

    def take_briefly(self, slot: Any, size: int) -> tuple[Tensor, Tensor]:
        """Return the matrix of each row's delta, and its transpose, until the next call."""


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


def rows_out(entered: Tensor, x: Tensor) -> Tensor:
    """Undo what `rows_in` did to tokens: `entered` is what came in."""
    return x.flatten(0, 1) if x.dim() > entered.dim() else x


def toward(without: Tensor, with_it: Tensor, strength: Tensor) -> Tensor:
    """Go from what is without a delta to what is with it: exactly the one at strength 0, the other at 1."""
    without, strength = without.to(with_it.dtype), strength.to(with_it.dtype)
    return torch.where(strength == 0, without, torch.lerp(without, with_it, strength))


def toward_rows(without: Tensor, with_it: Tensor, slot: RowSlot) -> Tensor:
    """Go, row by row, from what is without a delta to what is with it: exactly the one at strength 0.

    Chosen, and not multiplied by 0: another row's delta may hold, or get a gradient of, what is not a number.
    """
    without = without.to(with_it.dtype)
    if slot.partial:
        with_it = torch.lerp(without, with_it, slot.strengths_like(with_it))
    return torch.where(slot.holds_like(with_it), with_it, without)


def align(values: Tensor, x: Tensor) -> Tensor:
    """Shape `[rows, …]` values of fewer dimensions so that they broadcast over `x`, the last dimensions aligned."""
    more = x.dim() - values.dim()
    return values.reshape(values.shape[0], *(1,) * more, *values.shape[1:]) if more > 0 else values


def linear_rows(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Multiply `[rows, …, in]` by `[rows, out, in]`, row by row; the bias is `[rows, out]`."""
    if x.dim() == 3:
        y = torch.bmm(x, weight.mT)
    else:
        tokens = x.flatten(1, -2) if x.dim() > 2 else x.unsqueeze(1)
        y = torch.bmm(tokens, weight.mT).reshape(*x.shape[:-1], weight.shape[1])
    return y if bias is None else y + align(bias, y)


def number_rows(number: RowNumber, slot: RowSlot, x: Tensor) -> float | Tensor:
    """Return a factor: one number for all rows, or `[rows]`."""
    found = number.of(slot)
    return number.take(slot, x) if found is None else found


def number_like(number: RowNumber, slot: RowSlot, x: Tensor) -> float | Tensor:
    """Return a factor: one number for all rows, or `[rows, 1, …]`."""
    found = number.of(slot)
    return number.like(slot, x) if found is None else found


def add_number_times(y: Tensor, update: Tensor, factor: float | Tensor) -> Tensor:
    """Return y + factor · update."""
    if isinstance(factor, Tensor) or torch.compiler.is_compiling():  # they lose an `alpha`: see `passes/keep_scales.py`
        return y + factor * update
    return torch.add(y, update, alpha=factor)


def scaled_rows(x: Tensor, slot: RowSlot, number: RowNumber | float) -> tuple[Tensor, float]:
    """Scale narrow values by what is different from row to row; return the factor that is left for all."""
    scale = number if isinstance(number, float) else number.of(slot)
    if scale is None:
        assert not isinstance(number, float)
        x, scale = like(x * number.like(slot, x, wide=True), x), 1.0
    return (x * slot.strengths_like(x) if slot.partial else x), scale


def add_linear_rows(y: Tensor, x: Tensor, weight: Tensor, slot: RowSlot, number: RowNumber | float) -> Tensor:
    """Add, row by row, strength · factor · x Wᵀ to y. `x` is narrow, so what differs from row to row goes into it."""
    scaled, scale = scaled_rows(x, slot, number)
    if torch.compiler.is_compiling():  # they lose an `alpha`: see `passes/keep_scales.py`
        return y + linear_rows(scaled * scale, weight)
    if y.dim() == 3 and x.dim() == 3:
        added = torch.baddbmm(y, scaled, weight.mT, alpha=scale)
        if added.dtype is y.dtype:  # not so under autocast
            return added
    return torch.add(y, linear_rows(scaled, weight), alpha=scale)
