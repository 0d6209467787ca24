"""What other tools changed since the last switch: forwards that hide a socket, modules in the place of others.

Everything is compared by identity, in a few microseconds a forward.
"""

from __future__ import annotations

from itertools import repeat
from typing import Any, Protocol
from weakref import WeakKeyDictionary

from torch import Tensor, nn

from deltaspec.runtime.host import Host

_FORWARD = repeat("forward")


class Tracing(Protocol):
    """Who knows which modules a trace of the whole model calls: hooks on them would be inside of the deltas."""

    traced: set[str]


class Guard:
    """Compares a host with what it was when `take` was called."""

    def __init__(self, host: Host, tracing: Tracing) -> None:
        self._host, self._tracing = host, tracing
        self._taken: dict[str, nn.Module] | None = None
        """The modules that were taken; None: all is to be looked at anew."""
        self._homes: list[dict[str, Any]] = []
        self._tops: list[Any] = []
        self._known: WeakKeyDictionary[Any, list[Any]] = WeakKeyDictionary()
        """Forwards that were found, by what had been put in; whatever else changes makes those anew."""
        self._parents: list[dict[str, Any]] = []
        self._names: list[str] = []
        self._children: list[nn.Module | None] = []
        self._tables: list[dict[str, Any]] = []
        self._lengths: list[int] = []
        self._count = -1
        """Number of the sockets whose classes were taken."""
        self._modules: list[nn.Module] = []
        self._kinds: list[type[nn.Module]] = []
        """Classes of the modules in whose places something of ours ever stood."""
        self._forwards: list[tuple[Any, Any]] = []
        """Those classes, once each, with their forwards, which are patched, too."""
        self._traced: set[str] | None = None
        """FQNs of the modules that a trace called when their hooks were taken."""
        self._hooks: list[dict[int, Any]] = []
        """Registries of hooks of the modules that a trace calls."""
        self._counts: list[int] = []
        self._above: list[dict[str, Any]] = []
        """Attributes of the modules that have others inside, and no socket."""
        self._above_tops: list[Any] = []
        """Forwards that were put on those: they may read the weights of what is inside."""

    def take(self, installed: Any = None) -> None:
        """Remember how it is now; `installed` stands for what was just put in, if nothing else has changed since."""
        known = None if installed is None or self._taken is None else self._known.get(installed)
        if known is not None and len(known) == len(self._host.sockets) and self._traced is self._tracing.traced:
            self._tops = known
            return
        modules, sockets = self._host.modules, self._host.sockets
        if self._taken is not modules:
            places = [(m._modules, name) for m in modules.values() for name in m._modules if name != self._host.home]
            self._parents, self._names = [parent for parent, _ in places], [name for _, name in places]
            self._children = [*map(dict.get, self._parents, self._names)]
            self._tables = [m._parameters for m in modules.values() if isinstance(m, nn.Embedding)]
            self._taken, self._homes, self._count = modules, [], -1
        if len(self._homes) != len(sockets):
            self._homes = [socket.module.__dict__ for socket in sockets.values()]
        if self._count != len(sockets) or self._traced is not self._tracing.traced:
            self._traced = self._tracing.traced
            self._count, self._modules = len(sockets), [socket.module for socket in sockets.values()]
            self._kinds = [*map(type, self._modules)]
            self._forwards = [(kind, kind.forward) for kind in dict.fromkeys(self._kinds)]
            traced = [modules[fqn] for fqn in self._tracing.traced if fqn in modules]
            self._hooks = [hooks for m in traced for hooks in (m._forward_hooks, m._forward_pre_hooks)]
            self._counts = [*map(len, self._hooks)]
        self._tops = [*map(dict.get, self._homes, _FORWARD)]
        if installed is not None:
            self._known[installed] = self._tops
        self._lengths = [*map(_length, self._tables)]

    def forget(self) -> None:
        """Take everything for changed, until `take`."""
        self._taken = None

    def changed(self) -> bool:
        """Return whether anything is otherwise."""
        return (
            self.forwards_changed()
            or [*map(dict.get, self._parents, self._names)] != self._children
            or [*map(_length, self._tables)] != self._lengths
            or [*map(type, self._modules)] != self._kinds
            or any(kind.forward is not forward for kind, forward in self._forwards)
            or [*map(len, self._hooks)] != self._counts
        )

    def above_changed(self) -> bool:
        """Return whether a module around some hosts has another forward: it may read their weights."""
        return [*map(dict.get, self._above, _FORWARD)] != self._above_tops

    def look_above(self) -> None:
        """Remember the forwards of the modules around hosts, which `above_changed` compares."""
        sockets = self._host.sockets
        self._above = [m.__dict__ for m in self._host.modules.values() if m._modules and id(m) not in sockets]
        self._above_tops = [*map(dict.get, self._above, _FORWARD)]

    def forwards_changed(self) -> bool:
        """Return whether some host has another forward: all that a switch between deltas looks at."""
        sockets = self._host.sockets
        if len(self._homes) < len(sockets):  # needed for the first time since: nothing of ours was put in there
            new = [*sockets.values()][len(self._homes) :]
            self._homes += [socket.module.__dict__ for socket in new]
            self._tops = [*self._tops, *(socket.original for socket in new)]
        return self._taken is None or [*map(dict.get, self._homes, _FORWARD)] != self._tops


def _length(table: dict[str, Any]) -> int:
    """Return the number of rows of an embedding, given by its parameters: it is resized in place."""
    weight: Tensor | None = table.get("weight")
    return -1 if weight is None or not weight.dim() else weight.shape[0]
