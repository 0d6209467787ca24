"""What a switch writes: the forwards of one active set, put in the place of those of another.

Nothing here depends on how many deltas there are: a switch between two sets that change the same modules is one
dictionary entry a module.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from deltaspec.graphs.regions import Region


Forward = Callable[..., Any]


@dataclass(frozen=True, slots=True, eq=False)
class Places:
    """The modules that some programs write, by their `__dict__`; one object for all programs that write the same."""

    undo: dict[int, tuple[dict[str, Any], Forward | None]]
    """By id: (module's `__dict__`, the instance-level forward it had; None: it had none)."""
    surplus: dict[Places, list[tuple[dict[str, Any], Forward | None]]] = field(default_factory=dict)
    """By the places of the program that comes next: what is to be undone, since that one does not write it."""

    def left_by(self, following: Places) -> list[tuple[dict[str, Any], Forward | None]]:
        """Return what is to be undone once a program with other places is written."""
        found = self.surplus.get(following)
        if found is None:
            found = [entry for place, entry in self.undo.items() if place not in following.undo]
            self.surplus[following] = found
        return found


@dataclass(slots=True, eq=False)
class Program:
    """The forwards of one active set."""

    writes: list[tuple[dict[str, Any], Forward]] = field(default_factory=list)
    """(module's `__dict__`, its forward while this set is active)."""
    undo: list[tuple[dict[str, Any], Forward | None]] = field(default_factory=list)
    """(module's `__dict__`, the instance-level forward it had; None: it had none)."""
    regions: dict[str, Region] = field(default_factory=dict)
    """By the FQN of the module."""
    names: tuple[str, ...] = ()
    places: Places | None = None

    def settle(self, names: tuple[str, ...], known: dict[frozenset[int], Places]) -> None:
        """Finish: one write a module, the last of them, and the places shared with the programs that write the same."""
        last = {id(attributes): (attributes, forward) for attributes, forward in self.writes}
        undo = {id(attributes): (attributes, original) for attributes, original in self.undo}
        self.names, self.writes, self.undo = names, list(last.values()), []
        self.places = known.setdefault(frozenset(undo), Places(undo))

    def install(self, before: Program) -> None:
        """Make the deltas act in the place of those of another program: one write a module."""
        for attributes, forward in self.writes:
            attributes["forward"] = forward
        if before.places is not self.places:
            assert before.places is not None and self.places is not None
            for attributes, original in before.places.left_by(self.places):
                if original is None:
                    del attributes["forward"]
                else:
                    attributes["forward"] = original
