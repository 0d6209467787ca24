"""Which row is under which deltas: from what a user writes to tensors.

    deltas=["french", None, ("legal", "french"), {"german": 0.7}]

A row's deltas apply in the order of the spec, as attached ones do.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from numbers import Real
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from deltaspec.deltas.stacks import Kind

_LARGEST = torch.finfo(torch.float32).max
"""Strengths are float32 where they are data."""
_NUMBERS: WeakKeyDictionary[Kind, int] = WeakKeyDictionary()
_NEXT = count(1)

RowDeltas = Mapping[str, float]
"""The deltas of one row, in order of application, with their strengths."""


@dataclass(frozen=True, eq=False)
class Rows:
    """An assignment of deltas to rows as tensors, made by `c.rows(...)`. Pass it as `deltas=`.

    All tensors are `[slots, rows]`; see `Slot.fill`. Under torch.compile they are data: one graph serves all
    assignments of the same `kinds`.
    """

    kinds: tuple[str, ...]
    """Kinds of the slots, in the order of application, as keys of the model's own."""
    index: Tensor
    nearest: Tensor
    local: Tensor
    strength: Tensor
    names: tuple[tuple[str, ...], ...]
    """The deltas in each slot."""
    deltas: tuple[RowDeltas, ...]
    """Deltas and strengths that were asked for, row by row."""
    places: Mapping[str, int]
    """Row of each delta in its stack when this was made."""
    gone: str | None = None
    """A delta in it that was taken out of the model since."""

    def __len__(self) -> int:
        return self.index.shape[1]

    def __repr__(self) -> str:
        return f"Rows({[dict(row) or None for row in self.deltas]})"


def parse_rows(deltas: Sequence[Any], order: Mapping[str, int]) -> list[dict[str, float]]:
    """Read what a user gave, per row: None, a name, a tuple or list of names, or a dict of names and strengths.

    Names are not checked. Raises TypeError for anything else, ValueError for a strength that is not finite.
    """
    if isinstance(deltas, str | Mapping) or not isinstance(deltas, Sequence):
        raise TypeError(f"deltas is a list with one entry a row, not {type(deltas).__name__}")
    rows = []
    for number, entry in enumerate(deltas):
        row: dict[str, float] = {}
        parts = () if entry is None else (entry,) if isinstance(entry, str | Mapping) else entry
        if not isinstance(parts, tuple | list):
            raise TypeError(f"deltas[{number}] is None, a name, a tuple of names or a dict, not {entry!r}")
        for part in parts:
            given = {part: 1.0} if isinstance(part, str) else part
            if not isinstance(given, Mapping) or not all(isinstance(name, str) for name in given):
                raise TypeError(f"deltas[{number}] holds {part!r}, which is no name of a delta")
            for name, strength in given.items():
                if name in row:
                    raise ValueError(f"deltas[{number}] names {name!r} twice")
                row[name] = checked_strength(name, strength)
        rows.append(dict(sorted(row.items(), key=lambda item: order.get(item[0], -1))))
    return rows


def checked_strength(name: str, strength: Any) -> float:
    """Return a strength as a float. Raises TypeError or ValueError where it is none."""
    if isinstance(strength, bool) or not isinstance(strength, Real):
        raise TypeError(f"the strength of {name!r} is a number, not {strength!r}")
    try:
        value = float(strength)
    except OverflowError:
        value = math.inf
    if not abs(value) <= _LARGEST:
        hint = "give a number that is finite in float32, 0 for none of it, 1 for all"
        raise ValueError(f"the strength of {name!r} is {value}; {hint}")
    return value


def key_of(kind: Kind) -> str:
    """Return a key that no other kind of this process has: its method, and its number in the order of first use."""
    found = _NUMBERS.get(kind)
    if found is None:
        found = _NUMBERS.setdefault(kind, next(_NEXT))  # one number, whatever thread is first
    return f"{kind.method} {found}"


def chain(rows: Iterable[tuple[Kind, ...]], number: Callable[[Kind], int]) -> list[Kind]:
    """Return a sequence of kinds that holds every row's kinds in the row's order; short, not always the shortest.

    `number` gives kinds an order of their own, which is kept wherever all rows allow it: assignments of the same kinds
    then have the same sequence, and share a compiled graph.
    """
    stacks = set(rows)
    slots = sorted({kind for stack in stacks for kind in stack}, key=number)
    for stack in sorted(stacks, key=lambda stack: [number(kind) for kind in stack]):
        place = 0
        for kind in stack:
            found = next((i for i in range(place, len(slots)) if slots[i] is kind), None)
            if found is None:
                found = place
                slots.insert(found, kind)
            place = found + 1
    return slots


def places(row: Sequence[Kind], slots: Sequence[Kind]) -> list[int]:
    """Return the slot of each of a row's kinds."""
    found, start = [], 0
    for kind in row:
        start = next(i for i in range(start, len(slots)) if slots[i] is kind) + 1
        found.append(start - 1)
    return found


def to_tensors(
    table: Sequence[Sequence[tuple[str, int, float] | None]], rows: int, device: torch.device
) -> tuple[Tensor, Tensor, Tensor, Tensor, tuple[tuple[str, ...], ...]]:
    """Turn, slot by slot, each row's (name, place in the stack, strength) into the tensors of `Rows`."""
    index, nearest, local, strength, names = [], [], [], [], []
    for slot in table:
        used = dict.fromkeys(entry[0] for entry in slot if entry is not None)
        own = {name: number for number, name in enumerate(used, start=1)}
        some = next((entry[1] for entry in slot if entry is not None), 0)
        index.append([0 if e is None else e[1] for e in slot])
        nearest.append([some if e is None else e[1] for e in slot])
        local.append([0 if e is None else own[e[0]] for e in slot])
        strength.append([0.0 if e is None else e[2] for e in slot])
        names.append(tuple(own))
    shape = (len(table), rows)

    def tensor(values: list[Any], dtype: torch.dtype) -> Tensor:
        return torch.tensor(values, dtype=dtype, device=device).reshape(shape)

    at, near, own_place = (tensor(values, torch.long) for values in (index, nearest, local))
    return at, near, own_place, tensor(strength, torch.float32), tuple(names)
