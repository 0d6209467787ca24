"""What a switch writes: the forwards of one active set, put in the place of those of another.

Nothing here depends on how many deltas there are: a switch between two sets that change the same modules replaces the
content of one socket a module.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from deltaspec.graphs.regions import Region
from deltaspec.runtime.sockets import Forward, Socket, State, state_of


@dataclass(frozen=True, slots=True, eq=False)
class Footprint:
    """The sockets that some programs fill; one object for all programs that fill the same."""

    sockets: frozenset[Socket]
    surplus: dict[Footprint, list[Socket]] = field(default_factory=dict)
    """By other footprints: the sockets that only this one has."""

    def beyond(self, other: Footprint) -> list[Socket]:
        """Return the sockets that another footprint does not have."""
        if other not in self.surplus:
            self.surplus[other] = [socket for socket in self.sockets if socket not in other.sockets]
        return self.surplus[other]


@dataclass(slots=True, eq=False)
class Program:
    """The forwards of one active set."""

    forwards: dict[Socket, Forward] = field(default_factory=dict)
    """What each module runs while this set is active."""
    writes: list[tuple[Callable[[State], None], State]] = field(default_factory=list)
    """The same as what a switch does: (a socket's `fill`, what goes into it)."""
    regions: dict[str, Region] = field(default_factory=dict)
    """Regions by the FQN of their module."""
    names: tuple[str, ...] = ()
    footprint: Footprint | None = None

    def finish(self, names: tuple[str, ...], known: dict[frozenset[Socket], Footprint]) -> None:
        """Name the set, and share the footprint with the programs that fill the same sockets."""
        self.names, sockets = names, frozenset(self.forwards)
        self.writes = [(socket.fill, state_of(forward)) for socket, forward in self.forwards.items()]
        self.footprint = known.setdefault(sockets, Footprint(sockets))

    def install(self, before: Program) -> bool:
        """Make the deltas act in the place of those of another program; return whether other modules change."""
        for write, state in self.writes:
            write(state)
        if before.footprint is self.footprint:
            return False
        assert before.footprint is not None and self.footprint is not None
        for socket in before.footprint.beyond(self.footprint):
            socket.leave()
        for socket in self.footprint.beyond(before.footprint):
            socket.enter()
        return True
