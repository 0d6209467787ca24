"""Handles that a compiled model gives out: its deltas by name, and the context that puts the active set back."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from types import TracebackType

from deltaspec.deltas.modules import Delta, Deltas
from deltaspec.library.libraries import Libraries
from deltaspec.runtime.active import Active
from deltaspec.runtime.interrupts import surely


class Restore:
    """The result of `only` and `detached`: as a context, it puts the active set back at its end."""

    __slots__ = ("_active", "_before", "_strengths")

    def __init__(self, active: Active) -> None:
        self._active, self._before, self._strengths = active, active.active, active.strengths.as_dict()

    def __enter__(self) -> None:
        return None

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        surely(lambda: self._active.activate(self._before, strengths=self._strengths))


class DeltasView(Mapping[str, Delta]):
    """The deltas of a model that are in memory, by name: the compiled ones, then those of libraries."""

    def __init__(self, deltas: Deltas, libraries: Libraries) -> None:
        self._deltas, self._libraries = deltas, libraries

    def __getitem__(self, name: str) -> Delta:
        own = self._deltas.get(name)
        return self._libraries.expose(name) if own is None else own

    def __iter__(self) -> Iterator[str]:
        yield from (delta.name for delta in self._deltas.held())
        yield from self._libraries.loaded

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def __repr__(self) -> str:
        return f"<deltas: {', '.join(self)}>"
