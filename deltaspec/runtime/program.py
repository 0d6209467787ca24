"""What a switch writes: the forwards of one active set, put in the place of those of another.

Nothing here depends on how many deltas there are: a switch between two sets that change the same modules is one
dictionary entry a module.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from deltaspec.graphs.regions import Region

Forward = Callable[..., Any]


@dataclass(frozen=True, slots=True, eq=False)
class Footprint:
    """The modules that some programs write, by their `__dict__`; one object for all programs that write the same."""

    undo: dict[int, tuple[dict[str, Any], Forward | None]]
    """(module's `__dict__`, the instance-level forward it had, None where it had none), by id of the `__dict__`."""
    surplus: dict[Footprint, list[tuple[dict[str, Any], Forward | None]]] = field(default_factory=dict)
    """What is to be undone, by the footprint of the program that comes next: what that one does not write."""

    def left_by(self, following: Footprint) -> list[tuple[dict[str, Any], Forward | None]]:
        """Return what is to be undone once a program with another footprint is written."""
        if following not in self.surplus:
            self.surplus[following] = [entry for place, entry in self.undo.items() if place not in following.undo]
        return self.surplus[following]


@dataclass(slots=True, eq=False)
class Program:
    """The forwards of one active set."""

    writes: list[tuple[dict[str, Any], Forward]] = field(default_factory=list)
    """(module's `__dict__`, its forward while this set is active)."""
    undo: list[tuple[dict[str, Any], Forward | None]] = field(default_factory=list)
    """(module's `__dict__`, the instance-level forward it had; None: it had none)."""
    regions: dict[str, Region] = field(default_factory=dict)
    """Regions by the FQN of their module."""
    names: tuple[str, ...] = ()
    footprint: Footprint | None = None

    def finish(self, names: tuple[str, ...], known: dict[frozenset[int], Footprint]) -> None:
        """Keep one write a module, the last, and share the footprint with the programs that write the same modules."""
        last = {id(attributes): (attributes, forward) for attributes, forward in self.writes}
        undo = {id(attributes): (attributes, original) for attributes, original in self.undo}
        self.names, self.writes, self.undo = names, list(last.values()), []
        self.footprint = known.setdefault(frozenset(undo), Footprint(undo))

    def install(self, before: Program) -> None:
        """Make the deltas act in the place of those of another program: one write a module."""
        for attributes, forward in self.writes:
            attributes["forward"] = forward
        if before.footprint is not self.footprint:
            assert before.footprint is not None and self.footprint is not None
            put_back(before.footprint.left_by(self.footprint))


def put_back(undo: list[tuple[dict[str, Any], Forward | None]]) -> None:
    """Let modules, given by their `__dict__`, have the instance-level forwards that they had; None: there was none."""
    for attributes, original in undo:
        if original is None:
            del attributes["forward"]
        else:
            attributes["forward"] = original
