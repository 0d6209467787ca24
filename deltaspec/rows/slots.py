"""Rows of a batch under different deltas: which row is under which delta, as tensors that a forward reads.

A *slot* is one place in the order of application. In it each row has one delta of one kind (the same method, sites and
shapes), or none; what the rows have is data, so one program, and one compiled graph, serves every assignment.
"""

from __future__ import annotations

from threading import get_ident
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from deltaspec.diagnostics import DeltaSpecError, Diagnostic
from deltaspec.rows.batch import Batch

if TYPE_CHECKING:
    from deltaspec.deltas import Deltas
    from deltaspec.library.stacks import Stack
    from deltaspec.rows.assignment import Row, Rows


_NONE = torch.empty(0)


class Slot:
    """One place in the order of application: the delta of each row, and its strength."""

    __slots__ = (
        "_grown", "_number", "_partial", "_rows", "_shaped", "batch", "buffers", "index", "kept", "local", "nearest",
        "strength",
    )  # fmt: skip

    def __init__(self, number: int, batch: Batch) -> None:
        self._number, self.batch = number, batch
        self.clear()

    def fill(self, rows: Rows, keep: bool = False) -> None:
        """Take an assignment; `keep` what is gathered for it, for many forwards in a row. All tensors are `[rows]`.

        `index` are places in the kind's stack, 0 where a row has no delta; `nearest` has another row's place there, for
        formulas that zeros would break. `local` are places among `names`, from 1. `strength` is 0 for no delta.
        """
        number = self._number
        self.index, self.nearest = rows.index[number], rows.nearest[number]
        self.local, self.strength = rows.local[number], rows.strength[number]
        self._rows: Rows | None = rows
        self._partial: bool | None = None
        self._grown: dict[tuple[str, int], Tensor] = {}
        self._shaped: dict[tuple[int, int, torch.dtype], Tensor] = {}
        self.kept: dict[tuple[Source, int, bool], Tensor] | None = {} if keep else None
        self.buffers: dict[tuple[Any, ...], Tensor] = {}

    def clear(self) -> None:
        """Forget the assignment."""
        self.index = self.nearest = self.local = self.strength = _NONE
        self._rows = self._partial = None
        self._grown, self._shaped, self.buffers, self.kept = {}, {}, {}, None

    @property
    def assigned(self) -> list[tuple[str, float] | None]:
        """The delta that each row has here, with its strength."""
        if self._rows is None:
            return []
        local, names, strengths = self.local.tolist(), self.names, self.strength.tolist()
        return [None if place == 0 else (names[place - 1], s) for place, s in zip(local, strengths, strict=True)]

    @property
    def names(self) -> tuple[str, ...]:
        """The deltas that rows have here. Only training asks: in a compiled graph they are no data."""
        return () if self._rows is None else self._rows.names[self._number]

    @property
    def deltas(self) -> tuple[Row, ...]:
        """What each row is under, in all slots; no data in a compiled graph."""
        return () if self._rows is None else self._rows.deltas

    @property
    def empty(self) -> bool:
        """Whether no row has a delta here, where that is known: in a compiled graph it is data."""
        return not torch.compiler.is_compiling() and not self.names

    @property
    def partial(self) -> bool:
        """Whether some row may have its delta here at another strength than its full one; in a compiled graph."""
        if torch.compiler.is_compiling():
            return True
        if self._partial is None:
            self._partial = any(row.get(name, 1.0) != 1.0 for row in self.deltas for name in self.names)
        return self._partial

    def strengths_like(self, x: Tensor) -> Tensor:
        """Give the strengths `[rows, 1, …]` for a tensor `[rows, …]`, in its dtype."""
        if torch.compiler.is_compiling():
            return align(self.grown("strength", x.shape[0]), x).to(x.dtype)
        key = (x.shape[0], x.dim(), x.dtype)
        found = self._shaped.get(key)
        if found is None:
            found = self._shaped[key] = align(self.grown("strength", x.shape[0]), x).to(x.dtype)
        return found

    def grown(self, name: str, size: int) -> Tensor:
        """Give one of the tensors for a first dimension of this length: rows repeat in place, as beams do."""
        tensor: Tensor = getattr(self, name)
        if size == tensor.shape[0]:
            return tensor
        if torch.compiler.is_compiling():
            return tensor.repeat_interleave(size // tensor.shape[0])
        found = self._grown.get((name, size))
        if found is None:
            found = self._grown[name, size] = tensor.repeat_interleave(size // tensor.shape[0])
        return found


class Source:
    """One tensor of the deltas of a kind: all of them stacked, and each as it is trained."""

    __slots__ = ("_deltas", "_last", "_stack", "key")

    def __init__(self, stack: Stack, key: str, deltas: Deltas) -> None:
        self._stack, self.key, self._deltas = stack, key, deltas
        self._last = key.rpartition(".")[2]

    def take(self, slot: Slot, size: int, zeros: bool) -> Tensor:
        """Give each row its delta's tensor: `[size, …]`."""
        stacked = self._stack.tensors[self.key]
        if torch.is_grad_enabled() and stacked.is_floating_point():
            own = [self._tensor(name, stacked) for name in slot.names]
            if any(tensor.requires_grad for tensor in own):
                # Through the deltas' own parameters, so that each gets the gradient of its rows.
                table = torch.stack([stacked[0], *own] if zeros else own)
                place = slot.grown("local", size)
                return table.index_select(0, place if zeros else (place - 1).clamp(min=0))
        if slot.kept is None:
            return stacked.index_select(0, slot.grown("index" if zeros else "nearest", size))
        found = slot.kept.get((self, size, zeros))
        if found is None:
            found = stacked.index_select(0, slot.grown("index" if zeros else "nearest", size))
            slot.kept[self, size, zeros] = found
        return found

    def take_briefly(self, slot: Slot, size: int) -> Tensor:
        """Give each row its delta's tensor, or zeros, until the next call for a tensor of this last name and shape.

        For inference alone. New memory for each site is slower to write and to read again than a buffer for all.
        """
        stacked = self._stack.tensors[self.key]
        if slot.kept is not None or not stacked.is_cpu:
            return self.take(slot, size, zeros=True)
        key = (self._last, stacked.shape, size, stacked.dtype, torch.is_inference_mode_enabled(), get_ident())
        buffer = slot.buffers.get(key)
        if buffer is None:
            buffer = slot.buffers[key] = stacked.new_empty(size, *stacked.shape[1:])
        return torch.index_select(stacked, 0, slot.grown("index", size), out=buffer)

    def of(self, name: str) -> Tensor:
        """Give one delta's tensor."""
        return self._tensor(name, self._stack.tensors[self.key])

    def _tensor(self, name: str, stacked: Tensor) -> Tensor:
        """Give a delta's own tensor: its parameter, or its row, where it is in a library and not in training."""
        if name in self._deltas._modules:
            return self._deltas[name].tensor(self.key)
        return stacked[self._stack.names[name]]


def take(slot: Slot, source: Source, x: Tensor, zeros: bool) -> Tensor:
    """Give each row of `x` its delta's tensor; zeros, or another row's, where a row has none."""
    return source.take(slot, x.shape[0], zeros)


def rows_in(slot: Slot, x: Tensor) -> Tensor:
    """Give a hidden state its rows as first dimension.

    `x` is `[rows, …]` (times the beams), `[1, …]` for all rows, or the tokens of all rows, `[rows * tokens, width]`.
    What has two dimensions becomes `[rows, tokens, width]`: a row by itself then has as many as it has in a batch.
    Raises DeltaSpecError (DS442) where the rows cannot be told apart.
    """
    size, batch = x.shape[0] if x.dim() else 1, slot.batch
    if x.dim() == 2 and x.is_floating_point():
        if size == 1:
            x, size = x.expand(batch.size, -1), batch.size
        if size == batch.size or size in batch.totals:
            return x.reshape(batch.size, -1, x.shape[-1])
    elif size == batch.size or (size % batch.size == 0 and batch.images):
        return x
    elif size == 1:
        return x.expand(batch.size, *x.shape[1:])
    raise DeltaSpecError([_untold(x, batch)])


def rows_out(like: Tensor, x: Tensor) -> Tensor:
    """Undo what `rows_in` did to tokens: `like` is what came in."""
    return x.flatten(0, 1) if x.dim() > like.dim() else x


def toward(without: Tensor, with_it: Tensor, strength: Tensor) -> Tensor:
    """Go from what is without a delta to what is with it: exactly the one at strength 0, the other at 1."""
    return torch.lerp(without.to(with_it.dtype), with_it, strength.to(with_it.dtype))


def toward_rows(without: Tensor, with_it: Tensor, slot: Slot) -> Tensor:
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
        y = torch.bmm(x.reshape(x.shape[0], -1, x.shape[-1]), weight.mT).reshape(*x.shape[:-1], weight.shape[1])
    return y if bias is None else y + align(bias, y)


def add_linear_rows(y: Tensor, x: Tensor, weight: Tensor, slot: Slot, scale: float = 1.0) -> Tensor:
    """Add, row by row, strength · scale · x Wᵀ to y. `x` is narrow, so the strength is applied to it."""
    scaled = x * slot.strengths_like(x) if slot.partial else x
    if y.dim() == 3 and x.dim() == 3:
        return torch.baddbmm(y, scaled, weight.mT, alpha=scale)
    return torch.add(y, linear_rows(scaled, weight), alpha=scale)


def _untold(x: Tensor, batch: Batch) -> Diagnostic:
    message = (
        f"a hidden state {list(x.shape)} does not tell the {batch.rows} rows of the batch apart, "
        "so they cannot be under different deltas here"
    )
    hint = "run these rows one delta at a time: with c.only(name)"
    return Diagnostic("DS442", message, suggestion=hint)
