"""What a switch writes: the forwards of one active set, put in the place of those of another.

Nothing here depends on how many deltas there are: a switch between two sets that change the same modules replaces the
content of one socket a module.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from deltaspec.graphs.regions import Region
from deltaspec.runtime.sockets import Forward, Socket, State, state_of

Exit: TypeAlias = "tuple[Callable[[State], None], State, dict[str, Any], Forward, Forward | None]"
"""What taking a socket out needs: its `fill`, its idle content, the module's `__dict__`; what is there while it is in,
and when it is out."""


@dataclass(frozen=True, slots=True, eq=False, weakref_slot=True)
class Footprint:
    """The sockets that some programs fill; one object for all programs that fill the same."""

    sockets: frozenset[Socket]
    surplus: dict[Footprint, list[Exit]] = field(default_factory=dict)
    """By other footprints: the sockets that only this one has."""

    def beyond(self, other: Footprint) -> list[Exit]:
        """Return the sockets that another footprint does not have."""
        if other not in self.surplus:
            alone = [socket for socket in self.sockets if socket not in other.sockets]
            self.surplus[other] = [(s.fill, state_of(s.idle), s.module.__dict__, s.call, s.original) for s in alone]
        return self.surplus[other]


Filled: TypeAlias = tuple[frozenset[Socket], frozenset[Socket]]
"""The sockets that a program fills by itself, and those in which something stands."""


@dataclass(slots=True, eq=False)
class Program:
    """The forwards of one active set."""

    forwards: dict[Socket, Forward] = field(default_factory=dict)
    """What each module runs while this set is active."""
    standing: dict[Socket, Forward] = field(default_factory=dict)
    """What other modules run while it is active, which is the same for all programs that have them."""
    writes: list[tuple[Callable[[State], None], State]] = field(default_factory=list)
    """The same as what a switch does: (a socket's `fill`, what goes into it)."""
    stays: list[tuple[Callable[[State], None], State]] = field(default_factory=list)
    """The same of what stands: what a switch does between programs with other footprints."""
    regions: dict[str, Region] = field(default_factory=dict)
    """Regions by the FQN of their module."""
    names: tuple[str, ...] = ()
    footprint: Footprint | None = None

    def finish(self, names: tuple[str, ...], known: dict[Filled, Footprint]) -> None:
        """Name the set, and share the footprint with the programs that fill the same sockets."""
        self.names, sockets, standing = names, frozenset(self.forwards), frozenset(self.standing)
        self.writes = [(socket.fill, state_of(forward)) for socket, forward in self.forwards.items()]
        self.stays = [(socket.fill, state_of(forward)) for socket, forward in self.standing.items()]
        self.footprint = known.setdefault((sockets, standing), Footprint(sockets | standing))

    def install(self, before: Program) -> bool:
        """Make the deltas act in the place of those of another program; return whether other modules change."""
        changes = before.footprint is not self.footprint
        for write, state in self.stays if changes else ():
            write(state)
        for write, state in self.writes:
            write(state)
        if not changes:
            return False
        assert before.footprint is not None and self.footprint is not None
        # As `Socket.leave` and `enter` do it, without a call for each: this is most of what detaching costs.
        for fill, idle, attributes, call, original in before.footprint.beyond(self.footprint):
            fill(idle)
            if attributes.get("forward") is call:
                if original is None:
                    del attributes["forward"]
                else:
                    attributes["forward"] = original
        for _, _, attributes, call, original in self.footprint.beyond(before.footprint):
            if attributes.get("forward") is original:
                attributes["forward"] = call
        return True
