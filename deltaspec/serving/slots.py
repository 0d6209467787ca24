"""Rows of a batch under different deltas: which row is under which delta, as tensors that a forward reads.

A *slot* is one place in the order of application. In it each row has one delta of one kind (the same method, sites and
shapes), or none; what the rows have is data, so one program, and one compiled graph, serves every assignment.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from threading import get_ident
from typing import Any

import torch
from torch import Tensor

from deltaspec.deltas.modules import Deltas
from deltaspec.deltas.stack import Stack
from deltaspec.graphs.row_ops import align
from deltaspec.serving.assignment import RowDeltas, Rows
from deltaspec.serving.dispatch import Batch

_NONE = torch.empty(0, device="cpu")


class Slot:
    """One place in the order of application: the delta of each row, and its strength."""

    __slots__ = (
        "_displaced", "_grown", "_number", "_partial", "_rows", "_shaped", "batch", "buffers", "index", "kept", "local",
        "nearest", "strength",
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
        self._displaced: bool | None = None
        self._grown: dict[tuple[str, int], Tensor] = {}
        self._shaped: dict[tuple[int, int, torch.dtype], Tensor] = {}
        self.kept: dict[tuple[Source, int, bool], Tensor] | None = {} if keep else None
        self.buffers: dict[tuple[Any, ...], Tensor] = {}

    def clear(self) -> None:
        """Forget the assignment."""
        self.index = self.nearest = self.local = self.strength = _NONE
        self._rows = self._partial = self._displaced = None
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
            self._partial = any(row.get(name, 1.0) != 1.0 for row in self.deltas for name in self.names)
        return self._partial

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

    def strengths_like(self, x: Tensor) -> Tensor:
        """Return the strengths `[rows, 1, …]` for a tensor `[rows, …]`, in its dtype."""
        if torch.compiler.is_compiling():
            return align(self.grown("strength", x.shape[0]), x).to(x.dtype)
        key = (x.shape[0], x.dim(), x.dtype)
        found = self._shaped.get(key)
        if found is None:
            found = self._shaped[key] = align(self.grown("strength", x.shape[0]), x).to(x.dtype)
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


class Source:
    """One tensor of the deltas of a kind: all of them stacked, and each as it is trained."""

    __slots__ = ("_deltas", "_last", "_stack", "key")

    def __init__(self, stack: Stack, key: str, deltas: Deltas) -> None:
        self._stack, self.key, self._deltas = stack, key, deltas
        self._last = key.rpartition(".")[2]

    def take(self, slot: Slot, size: int, zeros: bool) -> Tensor:
        """Return the tensor of each row's delta, `[size, …]`."""
        stacked = self._stack.tensors[self.key]
        displaced = slot.is_displaced(self._deltas)
        if displaced or (torch.is_grad_enabled() and stacked.is_floating_point()):
            own = [self._tensor(name, stacked) for name in slot.names]
            if displaced or any(tensor.requires_grad for tensor in own):
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
        """Return the tensor of each row's delta, or zeros, until the next call for one of this name and shape.

        For inference alone. New memory for each site is slower to write and to read again than a buffer for all.
        """
        stacked = self._stack.tensors[self.key]
        if slot.kept is not None or not stacked.is_cpu or slot.is_displaced(self._deltas):
            return self.take(slot, size, zeros=True)
        key = (self._last, stacked.shape, size, stacked.dtype, torch.is_inference_mode_enabled(), get_ident())
        buffer = slot.buffers.get(key)
        if buffer is None:
            buffer = slot.buffers[key] = stacked.new_empty(size, *stacked.shape[1:])
        return torch.index_select(stacked, 0, slot.grown("index", size), out=buffer)

    def of(self, name: str) -> Tensor:
        """Return one delta's tensor."""
        return self._tensor(name, self._stack.tensors[self.key])

    def _tensor(self, name: str, stacked: Tensor) -> Tensor:
        """Return a delta's own tensor: its parameter, or its row, where it is in a library and not in training."""
        own = self._deltas.get(name)
        if own is not None:
            return own.tensor(self.key)
        return stacked[self._stack.names[name]]


Compute = Callable[[Mapping[str, Tensor], str | None], tuple[Tensor, ...]]
"""From one delta's tensors by own name, and its name (None in a compiled graph: it is data), to what is wanted."""


class Table:
    """Tensors of the deltas of a slot, or what is computed from those of each, for each row."""

    def __init__(self, slot: Slot, sources: Mapping[str, Source], compute: Compute | None = None) -> None:
        self.slot, self.sources, self.compute = slot, sources, compute

    def take(self, size: int) -> tuple[Tensor, ...]:
        """Return those of each row's delta, `[size, …]`, or another row's where it has none."""
        slot, compute = self.slot, self.compute
        if compute is None:
            return tuple(source.take(slot, size, zeros=False) for source in self.sources.values())
        if torch.compiler.is_compiling():
            rows = {name: source.take(slot, size, zeros=False) for name, source in self.sources.items()}
            computed: tuple[Tensor, ...] = torch.vmap(lambda own: compute(own, None))(rows)
            return computed
        if not slot.names:  # only in the kinds for rows of other batches: nothing is to be computed
            own = {name: source.take(slot, 1, zeros=False)[0] for name, source in self.sources.items()}
            return tuple(value.expand(size, *value.shape) for value in compute(own, None))
        each = [compute({key: source.of(name) for key, source in self.sources.items()}, name) for name in slot.names]
        place = (slot.grown("local", size) - 1).clamp(min=0)
        return tuple(torch.stack(values).index_select(0, place) for values in zip(*each, strict=True))
