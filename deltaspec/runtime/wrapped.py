"""Forwards that other tools put around ours, or in the place of ours: whether they call what they should.

What a wrapper holds says that it can call ours, not that it does. So the first forward in each mode is watched.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from threading import get_ident
from typing import Any

import torch

from deltaspec.backbone.holding import COMPILED
from deltaspec.diagnostics.findings import DeltaSpecError, Diagnostic
from deltaspec.runtime.sockets import Forward, Socket

_HINT = "let it call the forward that it found, or put it on before deltaspec.compile"


class Beneath:
    """A forward of another tool that the deltas work on, and that must not lead back to them."""

    def __init__(self, fqn: str, forward: Forward) -> None:
        self._fqn, self.forward = fqn, forward
        self._running: set[int] = set()

    __signature__ = property(lambda self: inspect.signature(self.forward))  # generate passes arguments by their names

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run it. Raises DeltaSpecError (DS458) where it calls what was put around it."""
        if torch.compiler.is_compiling():
            return self.forward(*args, **kwargs)
        me = get_ident()
        if me in self._running:
            message = f"the forward that was put on {self._fqn} calls the deltas' own in a way that cannot be seen"
            raise DeltaSpecError([Diagnostic("DS458", message, file="<model>", suggestion=_HINT)])
        self._running.add(me)
        try:
            return self.forward(*args, **kwargs)
        finally:
            self._running.discard(me)


class Wrapped:
    """The wrappers around sockets, each to be seen to lead to its socket once a mode."""

    def __init__(self) -> None:
        self._open: dict[Socket, tuple[str, set[bool]]] = {}
        """Sockets with their FQN and the training modes in which that was seen."""
        self.watching = False
        """Whether a forward is being watched; what stands in the sockets' places is ours then."""

    def take(self, sockets: Iterable[tuple[str, Socket]]) -> None:
        """Look at these from now on; what torch.compile made always calls what it was made of."""
        known = [(fqn, socket, socket.module.__dict__.get("forward")) for fqn, socket in sockets]
        self._open = {s: (fqn, set()) for fqn, s, top in known if top not in (s.call, s.original, None)
                      and not hasattr(top, COMPILED)}  # fmt: skip

    def watch(self) -> Callable[[], None] | None:
        """Watch the forward that comes next; return what is to be called after it, None where nothing is watched."""
        if not self._open:
            return None
        watched = [(s, fqn) for s, (fqn, seen) in self._open.items() if s.module.training not in seen]
        if not watched:
            return None
        self.watching, called, reached = True, set[Socket](), set[Socket]()
        before = [(s, s.module.__dict__["forward"], s.content) for s, _ in watched]
        for socket, top, content in before:
            socket.module.__dict__["forward"] = _noting(top, socket, called)
            socket.write(_noting(content, socket, reached))

        def after() -> None:
            for socket, top, content in before:
                socket.module.__dict__["forward"] = top
                socket.write(content)
            self.watching = False
            for socket in called & reached:
                self._open[socket][1].add(socket.module.training)
            if missed := [fqn for socket, fqn in watched if socket in called - reached]:
                message = f"deltas at {missed[0]} are bypassed: a forward that was put around theirs does not call it"
                raise DeltaSpecError([Diagnostic("DS437", message, file="<model>", suggestion=_HINT)])

        return after


def _noting(forward: Forward, socket: Socket, into: set[Socket]) -> Forward:
    def noted(*args: Any, **kwargs: Any) -> Any:
        into.add(socket)
        return forward(*args, **kwargs)

    return noted
