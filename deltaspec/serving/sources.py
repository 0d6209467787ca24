"""What a forward reads of the deltas of a slot: their tensors, factors and dropout, row by row."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from threading import get_ident

import torch
from torch import Tensor

from deltaspec.deltas.modules import Deltas
from deltaspec.graphs.row_ops import align
from deltaspec.serving.families import Family, Home, Part, SiteKey
from deltaspec.serving.padding import Buffer, largest, padded, padded_like
from deltaspec.serving.slots import Slot


class Source:
    """One tensor of the deltas of a family at a site: all of each member stacked, and each delta's as it is trained."""

    __slots__ = ("_deltas", "_known", "_members", "_name", "_shapes", "_site")

    def __init__(self, family: Family, site: SiteKey, name: str, deltas: Deltas) -> None:
        self._members, self._site, self._name, self._deltas = family.members, site, name, deltas
        self._shapes: dict[tuple[int, ...], tuple[int, ...]] = {}
        self._known: dict[tuple[int, ...], list[Home]] = {}

    def take(self, slot: Slot, size: int, zeros: bool) -> Tensor:
        """Return the tensor of each row's delta, `[size, …]`, padded with zeros to the largest."""
        members = slot.members
        stacked = self._stacked(members[0])
        displaced = slot.is_displaced(self._deltas)
        if displaced or (torch.is_grad_enabled() and stacked.is_floating_point()):
            own = self.own(slot)
            if displaced or any(tensor.requires_grad for tensor in own):
                # Through the deltas' own parameters, so that each gets the gradient of its rows.
                return self._padded(slot, own, size, zeros)
        if torch.compiler.is_compiling():
            return self._selected(slot, size, zeros)
        found = None if slot.kept is None else slot.kept.get((self, size, zeros))
        if found is None:
            if len(members) > 1:
                found = self._padded(slot, self.own(slot), size, zeros)
            else:
                found = stacked.index_select(0, slot.grown("index" if zeros else "nearest", size))
            if slot.kept is not None:
                slot.kept[self, size, zeros] = found
        return found

    def take_briefly(self, slot: Slot, size: int) -> tuple[Tensor, Tensor]:
        """Return the matrix of each row's delta, or zeros, and its transpose, until the next call for such ones.

        For inference alone. New memory for each site is slower to write and to read again than a buffer for all.
        """
        members = slot.members
        stacked = self._stacked(members[0])
        if slot.kept is not None or not stacked.is_cpu or slot.is_displaced(self._deltas):
            found = self.take(slot, size, zeros=True)
            return found, found.mT
        shapes = tuple([self._home(member).shape for member in members])
        key = (self._name, shapes, size, stacked.dtype, torch.is_inference_mode_enabled(), get_ident())
        buffer: Buffer | None = slot.buffers.get(key)
        if buffer is None:
            buffer = slot.buffers[key] = Buffer(size, shapes, stacked)
        if len(members) == 1:
            torch.index_select(stacked, 0, slot.grown("index", size), out=buffer.memory)
        else:
            own = self.own(slot)
            parts = [own[place - 1] if place else None for place, _ in slot.line.order]
            if len(parts) != size:
                parts = [part for part in parts for _ in range(size // len(parts))]
            buffer.fill(parts, slot.zeros)
        return buffer.rows, buffer.transposed

    def own(self, slot: Slot) -> list[Tensor]:
        """Return the tensor of each of the slot's deltas."""
        line = slot.line
        if torch.compiler.is_compiling():
            homes = [self._home(member) for member in line.homes]
        elif (known := self._known.get(line.homes)) is not None:
            homes = known
        else:
            homes = self._known[line.homes] = [self._home(member) for member in line.homes]
        # A delta's parameter, or its row, where it is in a library and not in training.
        return [
            home.stack.row(home.key, name) if delta is None else delta.read(home.attribute)
            for home, name, delta in zip(homes, line.names, slot.modules(self._deltas), strict=True)
        ]

    def _home(self, member: int) -> Home:
        return self._members[member].at[self._site].homes[self._name]

    def _stacked(self, member: int) -> Tensor:
        home = self._home(member)
        return home.stack.tensors[home.key]

    def _shape(self, members: tuple[int, ...]) -> tuple[int, ...]:
        """Return the shape that has room for the tensor of each of these members."""
        if torch.compiler.is_compiling():  # what a trace writes down, its guards would miss before
            return largest([self._home(member).shape for member in members])
        found = self._shapes.get(members)
        if found is None:
            found = self._shapes[members] = largest([self._home(member).shape for member in members])
        return found

    def _padded(self, slot: Slot, own: list[Tensor], size: int, zeros: bool) -> Tensor:
        """Put the deltas' own tensors together, row by row."""
        shape, order = self._shape(slot.members), slot.line.order
        if not torch.compiler.is_compiling() and size == len(order) <= len(own) + sum(not at for at, _ in order):
            none = None if zeros else own[0]
            parts = [own[place - 1] if place else none for place, _ in order]
            return padded(parts, shape, own[0], slot.zeros)
        table = padded([None, *own] if zeros else own, shape, own[0], slot.zeros)
        place = slot.grown("local", size)
        return table.index_select(0, place if zeros else (place - 1).clamp(min=0))

    def _selected(self, slot: Slot, size: int, zeros: bool) -> Tensor:
        """Select from the stacks of all members, by data: a compiled graph serves whatever rows have."""
        index = slot.grown("index" if zeros else "nearest", size)
        members = slot.members
        if len(members) == 1:
            return self._stacked(members[0]).index_select(0, index)
        of, found, shape = slot.grown("member" if zeros else "near", size), None, self._shape(members)
        for member in members:  # row 0 of each stack is zeros
            here = self._stacked(member).index_select(0, torch.where(of == member, index, 0))
            here = padded_like(here, shape)
            found = here if found is None else found + here
        assert found is not None
        return found


class Number:
    """A factor in the formula of a family at a site, by member."""

    __slots__ = ("_family", "_place", "_site")

    def __init__(self, family: Family, site: SiteKey, place: int) -> None:
        self._family, self._site, self._place = family, site, place

    def of(self, slot: Slot) -> float | None:
        """Return it where it is the same for all rows."""
        members = slot.members
        first = self._of(members[0])
        return first if all(self._of(member) == first for member in members[1:]) else None

    def take(self, slot: Slot, x: Tensor, wide: bool = False) -> Tensor:
        """Return that of each row of a tensor, `[rows]`, in its dtype; `wide`, in one that does not round it."""
        dtype = x.dtype if x.is_floating_point() and (x.element_size() > 2 or not wide) else torch.float32
        return _by_member(slot, {member: self._of(member) for member in slot.members}, x, dtype)

    def like(self, slot: Slot, x: Tensor, wide: bool = False) -> Tensor:
        """Return that of each row, `[rows, 1, …]`, for a tensor `[rows, …]`."""
        if torch.compiler.is_compiling():
            return align(self.take(slot, x, wide), x)
        key = (tuple(map(self._of, slot.members)), x.shape[0], x.dim(), x.dtype, wide)
        found: Tensor | None = slot.buffers.get(key)
        if found is None:
            found = slot.buffers[key] = align(self.take(slot, x, wide), x)
        return found

    def each(self, slot: Slot) -> list[float]:
        """Return that of each of the slot's deltas."""
        return [self._of(member) for member in slot.line.homes]

    def _of(self, member: int) -> float:
        return self._family.members[member].at[self._site].factors[self._place]


class Dropout:
    """The dropout of the deltas of a family at a site: each row's own, while its delta trains."""

    __slots__ = ("_deltas", "_family", "_site", "_slot")

    def __init__(self, slot: Slot, family: Family, site: SiteKey, deltas: Deltas) -> None:
        self._slot, self._family, self._site, self._deltas = slot, family, site, deltas

    def __call__(self, x: Tensor) -> Tensor:
        """Drop values. What depends on rows has them as first dimension."""
        slot = self._slot
        if torch.compiler.is_compiling():
            given = [self._of(member) for member in slot.members] if self._deltas.training else [0.0]
        else:
            given = list(map(self._now, slot.line.names, slot.line.homes)) or [0.0]
        if len(set(given)) == 1:  # rows without a delta lose values of an update that is zero
            return torch.dropout(x, given[0], train=True) if given[0] else x
        if torch.compiler.is_compiling():
            dropped = _by_member(slot, dict(zip(slot.members, given, strict=True)), x, x.dtype)
        else:
            rows = [given[place - 1] if place else 0.0 for place, _ in slot.line.order]
            dropped = x.new_tensor([row for row in rows for _ in range(x.shape[0] // len(rows))])
        keep = 1 - align(dropped, x)
        return x * ((torch.rand_like(x) < keep) / keep)

    def _of(self, member: int) -> float:
        at: Part = self._family.members[member].at[self._site]
        return at.dropout

    def _now(self, name: str, member: int) -> float:
        delta = self._deltas.get(name)
        training = self._deltas.training if delta is None else delta.training
        return self._of(member) if training else 0.0


def _by_member(slot: Slot, values: Mapping[int, float], x: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the value of each row's member, 0 for none, for a tensor whose first dimension is the rows."""
    if not torch.compiler.is_compiling():
        homes = slot.line.homes
        rows = [values[homes[place - 1]] if place else 0.0 for place, _ in slot.line.order]
        return x.new_tensor([row for row in rows for _ in range(x.shape[0] // len(rows))], dtype=dtype)
    table = [0.0] * (max(values) + 2)
    for member, value in values.items():
        table[member] = value
    # -1, no delta, is the last: zero
    return x.new_tensor(table, dtype=dtype).index_select(0, slot.grown("member", x.shape[0]) % len(table))


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
        of = {key: source.own(slot) for key, source in self.sources.items()}
        each = [compute({key: of[key][place] for key in of}, name) for place, name in enumerate(slot.names)]
        place = (slot.grown("local", size) - 1).clamp(min=0)
        return tuple(torch.stack(values).index_select(0, place) for values in zip(*each, strict=True))
