"""Handles that a compiled model gives out: its deltas by name, and the context that puts the active set back."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from types import TracebackType
from typing import TYPE_CHECKING

from deltaspec.deltas.modules import Delta

if TYPE_CHECKING:
    from deltaspec.runtime.active import Attachments


class Restore:
    """What `only` and `detached` give: nothing to do with, or a context that puts the active set back at its end."""

    __slots__ = ("_attachments", "_before", "_strengths")

    def __init__(self, attachments: Attachments) -> None:
        self._attachments, self._before = attachments, attachments.active
        self._strengths = attachments.strengths.as_dict()

    def __enter__(self) -> None:
        return None

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        self._attachments.activate(self._before, strengths=self._strengths)


class DeltasView(Mapping[str, Delta]):
    """The deltas of a model that are in memory, by name: the compiled ones, then those of libraries."""

    def __init__(self, attachments: Attachments) -> None:
        self._attachments = attachments

    def __getitem__(self, name: str) -> Delta:
        own = self._attachments.deltas._modules.get(name)
        if own is None:
            return self._attachments.libraries.expose(name)
        assert isinstance(own, Delta)
        return own

    def __iter__(self) -> Iterator[str]:
        yield from self._attachments.deltas._modules
        yield from self._attachments.libraries.loaded

    def __len__(self) -> int:
        return len(self._attachments.planned)

    def __repr__(self) -> str:
        return f"<deltas: {', '.join(self)}>"
