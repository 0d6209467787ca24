"""What the runtime asks of those above it: libraries that load deltas, and rows under different ones."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol


class View(Protocol):
    """One of the views that share deltas."""

    active: tuple[str, ...]
    deltas: Any
    stacks: Any
    gate: Any

    def rebind(self) -> None:
        """Bind tensors anew."""


class Residency(Protocol):
    """Has deltas in memory when they are needed."""

    opened: list[Any]

    def __contains__(self, name: object) -> bool: ...

    def delta(self, name: str) -> Any:
        """Return a delta that is in memory as a module."""

    def in_memory(self, names: Iterable[str], view: Any) -> AbstractContextManager[None]:
        """Have deltas in memory for what attaches them."""

    def moved(self) -> None:
        """Follow the backbone to another device or dtype."""

    def require(self, names: Iterable[str]) -> None:
        """Have deltas in memory."""

    def touch(self, names: Iterable[str]) -> None:
        """Note that deltas are used now."""


class RowSwitch(Protocol):
    """Runs rows under different deltas."""

    running: Any

    @property
    def armed(self) -> bool:
        """Whether it is installed."""

    def arm(self) -> None:
        """Install it."""

    def disarm(self) -> bool:
        """Take it out; return whether it was in."""

    def forget(self) -> None:
        """Forget all that holds tensors."""


@dataclass(frozen=True, slots=True)
class Ports:
    """Who makes these for an active set."""

    residency: Callable[[Any], Any]
    rows: Callable[[Any], Any]
