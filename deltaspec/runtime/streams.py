"""Forwards of modules whose input is read elsewhere, and of those whose deltas read it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import nn

from deltaspec.graphs.regions import hidden_in
from deltaspec.graphs.streams import Stream
from deltaspec.runtime.forms import first_argument
from deltaspec.runtime.placements import Placement
from deltaspec.runtime.sockets import Forward


class Tapped:
    """The forward of a module whose input others read: it is kept for them on the way."""

    def __init__(self, module: nn.Module, forward: Forward, streams: Sequence[Stream]) -> None:
        self.forward, self.streams = forward, tuple(streams)
        self.name = first_argument(type(module))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the module."""
        entering = hidden_in(args, kwargs, self.name)
        for stream in self.streams:
            stream.entered = entering
        return self.forward(*args, **kwargs)


class Reading:
    """The forward of a module whose deltas read streams: once it ends, they are empty."""

    def __init__(self, forward: Forward, streams: Sequence[Stream]) -> None:
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
