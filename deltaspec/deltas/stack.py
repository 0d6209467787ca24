"""One stack: a matrix per dtype and device, of which each row holds all tensors of one delta.

Each view that is handed out has a storage object of its own, over its own bytes alone. What writes whole storages
(`torch.save`, pickle, deepcopy) then writes one tensor, not the stack.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor
from torch.utils.dlpack import from_dlpack, to_dlpack  # type: ignore[attr-defined]

Place = tuple[torch.dtype, torch.device]
_VIEWS = 256
"""Rows whose tensors are kept as objects: each of those takes about a kilobyte."""
_STEP = 16
"""Every tensor of a row starts at a multiple of so many values, relative to the row."""


@dataclass(frozen=True, slots=True)
class Extent:
    """Place of a tensor in a row."""

    group: int
    """Index of the matrix it is in."""
    offset: int
    shape: tuple[int, ...]
    count: int
    """Number of values."""


class Layout:
    """Places of the tensors of alike deltas in their rows: a matrix per dtype and device, in it by storage key."""

    def __init__(self, tensors: Mapping[str, tuple[tuple[int, ...], Place]]) -> None:
        self.slots: dict[str, Extent] = {}
        self.widths: list[int] = []
        """Values in a row, by group."""
        groups: dict[Place, int] = {}
        for key in sorted(tensors):
            shape, place = tensors[key]
            group = groups.setdefault(place, len(groups))
            if group == len(self.widths):
                self.widths.append(0)
            count = prod(shape)
            self.slots[key] = Extent(group, self.widths[group], shape, count)
            self.widths[group] += -(-count // _STEP) * _STEP
        self.places = tuple(groups)

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor]) -> Layout:
        """Return the layout of these tensors."""
        return cls({key: (tuple(t.shape), (t.dtype, t.device)) for key, t in tensors.items()})

    def signature(self, places: Sequence[Place]) -> frozenset[tuple[str, Place]]:
        """Return what two stacks of one kind may differ in, dtype and device of each tensor, by those of the groups."""
        return frozenset((key, places[slot.group]) for key, slot in self.slots.items())


class Stack:
    """The rows of alike deltas. `tensors` are made anew when it grows or is moved. Free rows hold anything."""

    def __init__(self, layout: Layout) -> None:
        self.layout, self.capacity = layout, 0
        self.names: dict[str, int] = {}
        """Row of each delta, from 1."""
        self.flats = [
            torch.zeros(1, width, dtype=dtype, device=device)
            for width, (dtype, device) in zip(layout.widths, layout.places, strict=True)
        ]
        """The rows, `[capacity + 1, width]`, by group. Row 0 is zeros."""
        self.tensors: dict[str, Tensor] = {}
        """`[capacity + 1, *shape]`, views of the rows, by storage key."""
        self._free: list[int] = []
        self._views: dict[int, dict[str, Tensor]] = {}
        """Tensors of single rows that were asked for."""
        self._cut()

    def make_room(self, more: int, limit: int | None = None) -> bool:
        """Make room for so many more deltas; return whether the rows moved.

        The capacity grows by half at least, but not above `limit` if that is enough. Rows that are not written take no
        memory on the CPU.
        """
        if more <= len(self._free):
            return False
        needed = len(self.names) + more
        capacity = max(needed, self.capacity if needed <= self.capacity else self.capacity + self.capacity // 2)
        capacity = capacity if limit is None else max(needed, min(capacity, limit))
        for group, old in enumerate(self.flats):
            fresh = old.new_empty(capacity + 1, old.shape[1])
            for row in (0, *self.names.values()):
                if row <= capacity:
                    fresh[row].copy_(old[row])
            self.flats[group] = fresh
        self.capacity = capacity
        taken = set(self.names.values())
        self._free = [row for row in range(capacity, 0, -1) if row not in taken]
        self._cut()
        return True

    def empty(self) -> None:
        """Free all memory, when no delta is left."""
        assert not self.names
        self.flats = [flat[:1].clone() for flat in self.flats]
        self.capacity, self._free = 0, []
        self._cut()

    def move(self, fn: Callable[[Tensor], Tensor]) -> None:
        """Move or cast the rows, as `nn.Module._apply` does with parameters."""
        self.flats = [fn(flat) for flat in self.flats]
        self._cut()

    def take(self, name: str) -> int:
        """Assign a delta a row, whose values are undefined; there must be room."""
        row = self.names[name] = self._free.pop()
        return row

    def release(self, name: str, *, again: bool) -> None:
        """Take a delta's row back.

        `again`: it may be written again. Where a tensor outside may still be a view of it (a `state_dict`, say), it
        must not be; such rows stay out of use until the stack is made anew.
        """
        row = self.names.pop(name)
        self._views.pop(row, None)
        if again:
            self._free.append(row)

    def view(self, key: str, row: int) -> Tensor:
        """Return a delta's tensor: a view of its row, with a storage object of its own where the device allows that."""
        view = self.tensors[key][row]
        return from_dlpack(to_dlpack(view)) if view.device.type in ("cpu", "cuda") else view

    def row(self, key: str, name: str) -> Tensor:
        """Return a delta's tensor as it lies in its row: to be read in a forward, and kept by nobody."""
        row = self.names[name]
        views = self._views.get(row)
        if views is None:
            if len(self._views) >= _VIEWS:
                self._views.clear()
            views = self._views[row] = {}
        found = views.get(key)
        if found is None:
            found = views[key] = self.tensors[key][row]
        return found

    def _cut(self) -> None:
        self._views.clear()
        self.tensors = {
            key: self.flats[slot.group][:, slot.offset : slot.offset + slot.count].view(self.capacity + 1, *slot.shape)
            for key, slot in self.layout.slots.items()
        }
