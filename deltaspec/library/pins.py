"""What keeps deltas of libraries in memory: objects that know where they lie, such as rows that were prepared."""

from __future__ import annotations

import weakref
from collections.abc import Iterable


class Pins:
    """Names of deltas, each held for as long as some object lives."""

    def __init__(self) -> None:
        self._held: dict[int, tuple[str, ...]] = {}
        """Names by the id of the object that holds them."""

    def add(self, holder: object, names: Iterable[str]) -> None:
        """Hold names for an object."""
        if held := tuple(names):
            key = id(holder)
            self._held[key] = held
            weakref.finalize(holder, self._held.pop, key, None)

    def names(self) -> set[str]:
        """Return all names that are held now."""
        return {name for names in list(self._held.values()) for name in names}
