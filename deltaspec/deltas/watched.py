"""Registries of parameters that notice what is put into them: compiled graphs of rows read stacks, not registries."""

from __future__ import annotations

import copy
from typing import Any

from torch import nn

from deltaspec.deltas.modules import Delta


class Displaced:
    """Counts the parameters that are others than those in the stacks; a plain number, so that Dynamo guards on it."""

    def __init__(self) -> None:
        self.count = 0
        self._places: set[tuple[int, str]] = set()

    def note(self, home: int, name: str, displaced: bool) -> None:
        """Take in whether one parameter, given by its registry and name, is displaced."""
        (self._places.add if displaced else self._places.discard)((home, name))
        self.count = len(self._places)


class Watched(dict[str, Any]):
    """The registry of a stacked delta's parameters."""

    __slots__ = ("_displaced", "_stacked")

    def __init__(self, parameters: dict[str, nn.Parameter | None], displaced: Displaced) -> None:
        super().__init__(parameters)
        self._displaced = displaced
        self.stacked()

    def stacked(self) -> None:
        """Take what is registered for what is in the stack."""
        for name in getattr(self, "_stacked", ()):
            self._displaced.note(id(self), name, False)
        self._stacked = {name: id(parameter) for name, parameter in self.items()}

    def __setitem__(self, name: str, value: Any) -> None:
        super().__setitem__(name, value)
        self._displaced.note(id(self), name, self._stacked.get(name) != id(value))

    def __delitem__(self, name: str) -> None:
        super().__delitem__(name)
        self._displaced.note(id(self), name, name in self._stacked)

    def __deepcopy__(self, memo: dict[int, Any]) -> dict[str, Any]:
        found = memo[id(self)] = {name: copy.deepcopy(value, memo) for name, value in self.items()}
        return found

    def __reduce__(self) -> tuple[Any, ...]:
        return dict, (dict(self),)


def watch(delta: Delta, displaced: Displaced) -> None:
    """Let the parameters of a stacked delta, in one view of it, be watched from now on."""
    registry = delta.__dict__["_parameters"]
    if not isinstance(registry, Watched):
        delta.__dict__["_parameters"] = Watched(registry, displaced)


def unwatch(delta: Delta) -> None:
    """Let a delta's parameters be watched no more, in all views of it."""
    stacked(delta)
    for view in (delta, *delta.own_tensors.views):
        view.__dict__["_parameters"] = dict(view.__dict__["_parameters"])


def stacked(delta: Delta) -> None:
    """Take what is registered in all views of a delta for what is in its stack."""
    for view in (delta, *delta.own_tensors.views):
        registry = view.__dict__["_parameters"]
        if isinstance(registry, Watched):
            registry.stacked()
