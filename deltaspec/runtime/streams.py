"""Forwards of modules whose input is read elsewhere, and of those whose deltas read it."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import nn

from deltaspec.graphs.regions import hidden_in
from deltaspec.graphs.streams import Stream
from deltaspec.runtime.forms import first_argument
from deltaspec.runtime.placements import Placement
from deltaspec.runtime.sockets import Forward


class Tapped:
    """The forward of a module whose input others read: it is kept for them on the way."""

    def __init__(self, module: nn.Module, forward: Forward, streams: Iterable[Stream]) -> None:
        self.forward, self.streams = forward, tuple(streams)
        self.name = first_argument(type(module))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the module."""
        entering = hidden_in(args, kwargs, self.name)
        for stream in self.streams:
            stream.entered = entering
        return self.forward(*args, **kwargs)


class Reading:
    """The forward of a module in which streams are read: once it ends, they are empty.

    That is the module whose deltas read them; and the whole model, of which a forward may fail before it gets there.
    """

    __signature__ = property(lambda self: inspect.signature(self.forward))  # generate passes arguments by their names

    def __init__(self, forward: Forward, streams: Iterable[Stream]) -> None:
        self.forward, self.streams = forward, tuple(streams)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the module."""
        try:
            return self.forward(*args, **kwargs)
        finally:
            for stream in self.streams:
                stream.entered = None


class Streams:
    """The streams of one view, by module that is read and host that reads it."""

    def __init__(self) -> None:
        self._known: dict[tuple[str, str], Stream] = {}

    def of(self, placement: Placement, host: str) -> Stream | None:
        """Return what a placement's formula reads; None where it reads nothing."""
        read = placement.planned.site.stream
        return None if read is None else self._known.setdefault((read, host), Stream(read, host))

    def at(self, hosts: Mapping[str, Iterable[Placement]]) -> dict[str, list[Stream]]:
        """Return the streams that placements read, by the module that they are of."""
        found: dict[str, dict[str, Stream]] = {}
        for host, placements in hosts.items():
            for placement in placements:
                if (stream := self.of(placement, host)) is not None:
                    found.setdefault(stream.read, {})[host] = stream
        return {read: list(streams.values()) for read, streams in found.items()}


def tap(
    tapped: Mapping[str, Iterable[Stream]], modules: Mapping[str, nn.Module], so_far: Callable[[str], Forward]
) -> dict[str, Forward]:
    """Build the forwards that fill streams, and that of the whole model, which empties them, around those so far."""
    found: dict[str, Forward] = {fqn: Tapped(modules[fqn], so_far(fqn), streams) for fqn, streams in tapped.items()}
    if tapped:
        found[""] = Reading(so_far(""), (stream for streams in tapped.values() for stream in streams))
    return found
