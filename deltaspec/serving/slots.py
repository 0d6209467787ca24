"""Rows of a batch under different deltas: which row is under which delta, as tensors that a forward reads.

A *slot* is one place in the order of application, at sites that the same deltas have. In it each row has one delta of
one family (the same method and formula, whatever its size and scale), or none; what the rows have is data, so one
program, and one compiled graph, serves every assignment.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from deltaspec.deltas.modules import Delta, Deltas
from deltaspec.graphs.row_ops import align
from deltaspec.serving.assignment import Line, RowDeltas, Rows
from deltaspec.serving.dispatch import Batch

_NONE = torch.empty(0, device="cpu")
_EMPTY = Line((), (), (), (), ())


class Slot:
    """One place in the order of application: the delta of each row, and its strength."""

    __slots__ = (
        "_displaced", "_grown", "_modules", "_number", "_partial", "_rows", "_runs", "_shaped", "batch", "buffers",
        "index", "kept", "line", "local", "member", "near", "nearest", "strength", "zeros",
    )  # fmt: skip

    def __init__(self, number: int, batch: Batch) -> None:
        self._number, self.batch = number, batch
        self.zeros: dict[Any, Any] = {}
        """What tensors are padded with: a little memory, which stays."""
        self.clear()

    def fill(self, rows: Rows, keep: bool = False) -> None:
        """Take an assignment; `keep` what is gathered for it, for many forwards in a row. All tensors are `[rows]`.

        `index` are places in the stack of each row's delta, 0 where a row has none; `nearest` has another row's place
        there, for formulas that zeros would break. `member` and `near` say of which member of the family those are, -1
        for none. `local` are places among `names`, from 1. `strength` is 0 for no delta.
        """
        number = self._number
        self.index, self.nearest = rows.index[number], rows.nearest[number]
        self.member, self.near = rows.member[number], rows.near[number]
        self.local, self.strength = rows.local[number], rows.strength[number]
        self.line = rows.lines[number]
        self._rows: Rows | None = rows
        self._partial: bool | None = None
        self._displaced: bool | None = None
        self._modules: list[Delta | None] | None = None
        self._grown: dict[tuple[str, int], Tensor] = {}
        self._shaped: dict[tuple[int, int, torch.dtype], Tensor] = {}
        self._runs: dict[int, tuple[tuple[int, int, int, float], ...]] = {}
        self.kept: dict[tuple[Any, int, bool], Tensor] | None = {} if keep else None
        self.buffers: dict[tuple[Any, ...], Any] = {}

    def clear(self) -> None:
        """Forget the assignment."""
        self.index = self.nearest = self.local = self.member = self.near = self.strength = _NONE
        self.line = _EMPTY
        self._rows = self._partial = self._displaced = self._modules = None
        self._grown, self._shaped, self._runs, self.buffers, self.kept = {}, {}, {}, {}, None

    @property
    def assigned(self) -> list[tuple[str, float] | None]:
        """The delta that each row has here, with its strength."""
        return [None if place == 0 else (self.names[place - 1], strength) for place, strength in self.line.order]

    @property
    def names(self) -> tuple[str, ...]:
        """The deltas that rows have here. Only training asks: in a compiled graph they are no data."""
        return self.line.names

    @property
    def deltas(self) -> tuple[RowDeltas, ...]:
        """Deltas and strengths of each row, in all slots; no data in a compiled graph."""
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
            self._partial = any(place and strength != 1.0 for place, strength in self.line.order)
        return self._partial

    @property
    def members(self) -> tuple[int, ...]:
        """Members of the family that rows have here; in a compiled graph, those that they may have."""
        return (not torch.compiler.is_compiling() and self.line.used) or self.line.members

    def modules(self, deltas: Deltas) -> list[Delta | None]:
        """Return the slot's deltas, those that are modules."""
        if torch.compiler.is_compiling():
            return [deltas.get(name) for name in self.names]
        if self._modules is None:
            self._modules = [deltas.get(name) for name in self.names]
        return self._modules

    def is_displaced(self, deltas: Deltas) -> bool:
        """Return whether some delta here has other tensors than its own for this call.

        In a graph of the whole model none has; one of a part of it is compiled when this is known already.
        """
        if self._displaced is None:
            if torch.compiler.is_compiling():
                return False
            held = (deltas.get(name) for name in self.names)
            self._displaced = any(delta is not None and delta.is_displaced() for delta in held)
        return self._displaced

    def is_various(self, size: int) -> bool:
        """Return whether so many rows have matrices of several sizes, or few deltas."""
        return len(self.line.used) > 1 or 2 * len(self.runs(size)) <= size

    def runs(self, size: int) -> tuple[tuple[int, int, int, float], ...]:
        """Return neighbours that are under one delta, of so many rows: (begin, end, place among `names`, strength)."""
        if size not in self._runs:
            beams, found = size // len(self.line.order), list[tuple[int, int, int, float]]()
            for row, (place, strength) in enumerate(self.line.order):
                begin = row * beams
                if found and found[-1][2:] == (place, strength):
                    begin = found.pop()[0]
                found.append((begin, (row + 1) * beams, place, strength))
            self._runs[size] = tuple(found)
        return self._runs[size]

    def strengths_like(self, x: Tensor) -> Tensor:
        """Return the strengths `[rows, 1, …]` for a tensor `[rows, …]`, in its dtype."""
        if torch.compiler.is_compiling():
            return align(self.grown("strength", x.shape[0]), x).to(x.dtype)
        key = (x.shape[0], x.dim(), x.dtype)
        found = self._shaped.get(key)
        if found is None:
            found = self._shaped[key] = align(self.grown("strength", x.shape[0]), x).to(x.dtype)
        return found

    def holds_like(self, x: Tensor) -> Tensor:
        """Return `[rows, 1, …]` for a tensor `[rows, …]`: whether a row has a delta here, at a strength but 0."""
        if torch.compiler.is_compiling():
            return self.strengths_like(x) != 0
        key = (x.shape[0], x.dim(), torch.bool)
        found = self._shaped.get(key)
        if found is None:
            found = self._shaped[key] = self.strengths_like(x) != 0
        return found

    def grown(self, name: str, size: int) -> Tensor:
        """Return one of the tensors for a first dimension of this length: rows repeat in place, as beams do."""
        tensor: Tensor = getattr(self, name)
        if size == tensor.shape[0]:
            return tensor
        if torch.compiler.is_compiling():
            return tensor.repeat_interleave(size // tensor.shape[0])
        found = self._grown.get((name, size))
        if found is None:
            found = self._grown[name, size] = tensor.repeat_interleave(size // tensor.shape[0])
        return found
