"""Which row is under which deltas: from what a user writes to tensors.

    deltas=["french", None, ("legal", "french"), {"german": 0.7}]

A row's deltas apply in the order of the spec, as attached ones do.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from deltaspec.deltas.stack import Stack
from deltaspec.diagnostics.findings import Diagnostic
from deltaspec.serving.families import Family, Member, Place, reach

_LARGEST = torch.finfo(torch.float32).max
"""Strengths are float32 where they are data."""

RowDeltas = Mapping[str, float]
"""The deltas of one row, in order of application, with their strengths."""


@dataclass(frozen=True, slots=True)
class Line:
    """What of an assignment is no data: the deltas that rows have at one place, at the sites that are alike in this."""

    names: tuple[str, ...]
    homes: tuple[int, ...]
    """The member of the family that each is of."""
    order: tuple[tuple[int, float], ...]
    """By row: place among `names`, from 1, or 0 for no delta; strength."""
    used: tuple[int, ...]
    """Members of the family that rows have."""
    members: tuple[int, ...]
    """Members that rows may have in the same compiled graph."""


@dataclass(frozen=True, eq=False)
class Rows:
    """An assignment of deltas to rows as tensors, made by `c.rows(...)`. Pass it as `deltas=`.

    All tensors are `[lines, rows]`; see `Slot.fill`. Under torch.compile they are data: one graph serves all
    assignments of the same `kinds` and members.
    """

    kinds: tuple[str, ...]
    """The places in the order of application, as keys of the model's own."""
    index: Tensor
    nearest: Tensor
    local: Tensor
    member: Tensor
    near: Tensor
    strength: Tensor
    lines: tuple[Line, ...]
    deltas: tuple[RowDeltas, ...]
    """Deltas and strengths that were asked for, row by row."""
    places: Mapping[str, int]
    """Row of each delta in its stack when this was made."""
    stacks: Mapping[str, Stack]
    """The stack of each delta when this was made."""
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


def chain(rows: Iterable[tuple[Family, ...]], number: Callable[[Family], int]) -> list[Family]:
    """Return a sequence of families that holds every row's in the row's order; short, not always the shortest.

    `number` gives families an order of their own, which is kept wherever all rows allow it: assignments of the same
    ones then have the same sequence, and share a compiled graph.
    """
    stacks = set(rows)
    slots = sorted({family for stack in stacks for family in stack}, key=number)
    for stack in sorted(stacks, key=lambda stack: [number(family) for family in stack]):
        place = 0
        for family in stack:
            found = next((i for i in range(place, len(slots)) if slots[i] is family), None)
            if found is None:
                found = place
                slots.insert(found, family)
            place = found + 1
    return slots


def places(row: Sequence[Family], slots: Sequence[Family]) -> list[int]:
    """Return the place of each of a row's families."""
    found, start = [], 0
    for family in row:
        start = next(i for i in range(start, len(slots)) if slots[i] is family) + 1
        found.append(start - 1)
    return found


@dataclass(frozen=True, slots=True)
class Entry:
    """A row's delta at one place."""

    name: str
    place: int
    """Its place in its stack."""
    strength: float
    member: int
    """The member of the family that it is of."""
    scope: int
    """The sites that it has."""


def arrange(
    rows: Sequence[RowDeltas],
    among: Sequence[str],
    found: Mapping[str, tuple[Family, Member]],
    own: Mapping[str, Stack],
    number: Callable[[Family], int],
) -> tuple[list[Place], list[list[Entry | None]]]:
    """Return the places in the order of application, and at each what every row has; `among` widens the places."""
    stacked = [tuple(row) for row in (*rows, *([name] for name in among))]
    order = chain([tuple(found[name][0] for name in row) for row in stacked], number)
    having: list[dict[str, None]] = [{} for _ in order]
    table: list[list[Entry | None]] = [[None] * len(rows) for _ in order]
    for at, row in enumerate(stacked):
        for name, place in zip(row, places([found[name][0] for name in row], order), strict=True):
            member = found[name][1]
            having[place][name] = None
            if at < len(rows):
                table[place][at] = Entry(name, own[name].names[name], rows[at][name], member.number, member.scope)
    return [reach(names, found, family) for names, family in zip(having, order, strict=True)], table


def to_tensors(
    given: Sequence[Place], table: Sequence[Sequence[Entry | None]], rows: int, device: torch.device
) -> dict[str, Any]:
    """Turn, place by place, what each row has into the tensors and the lines of `Rows`, by name."""
    numbers: list[list[list[int]]] = [[], [], [], [], []]
    strengths: list[list[float]] = []
    lines = []
    for place, assigned in zip(given, table, strict=True):
        for line in place.lines:
            here = [e if e is not None and e.scope in line else None for e in assigned]
            used = {e.name: e for e in here if e is not None}
            own = {name: number for number, name in enumerate(used, start=1)}
            some = next(iter(used.values()), None)
            near = [some if e is None else e for e in here]
            order = [(0, 0.0) if e is None else (own[e.name], e.strength) for e in here]
            values = (
                [0 if e is None else e.place for e in here], [0 if e is None else e.place for e in near],
                [number for number, _ in order],
                [-1 if e is None else e.member for e in here], [-1 if e is None else e.member for e in near],
            )  # fmt: skip
            for so_far, more in zip(numbers, values, strict=True):
                so_far.append(more)
            strengths.append([strength for _, strength in order])
            homes = tuple(e.member for e in used.values())
            lines.append(Line(tuple(own), homes, tuple(order), tuple(sorted(set(homes))), place.on(line)))
    shape = (len(lines), rows)
    # Each in memory of its own: where a view begins would be data to a compiled graph.
    found = {
        name: torch.tensor(values, dtype=torch.long, device=device).reshape(shape)
        for name, values in zip(("index", "nearest", "local", "member", "near"), numbers, strict=True)
    }
    strength = torch.tensor(strengths, dtype=torch.float32, device=device).reshape(shape)
    return {**found, "strength": strength, "lines": tuple(lines)}


def gone_since(name: str) -> Diagnostic:
    """Return the finding for rows that name a delta which was taken out."""
    message = f"the delta {name!r} was removed since these rows were prepared"
    return Diagnostic("DS434", message, suggestion="prepare them again without it: c.rows([...])")
