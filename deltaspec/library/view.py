"""What a user has of a library."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from deltaspec.diagnostics.findings import require_known
from deltaspec.library.libraries import Libraries
from deltaspec.library.opened import Opened
from deltaspec.storage.matching import Match


class LibraryView:
    """One library of a model. Made by `c.library(dir)`."""

    def __init__(self, libraries: Libraries, opened: Opened) -> None:
        self._libraries, self._opened = libraries, opened

    @property
    def names(self) -> tuple[str, ...]:
        """All names, in the order in which they apply."""
        return tuple(self._opened.entries)

    @property
    def loaded(self) -> tuple[str, ...]:
        """Names of the deltas in memory, the one not used for longest first."""
        return tuple(self._opened.loaded)

    @property
    def nbytes(self) -> int:
        """Size of the tensors in memory."""
        return sum(template.size for template in list(self._opened.loaded.values()))

    def load(self, *names: str) -> LibraryView:
        """Load deltas by name, or all, before they are needed; all or none. Raises DeltaSpecError with all findings."""
        self._libraries.require(self._known(names))
        return self

    def drop(self, *names: str) -> LibraryView:
        """Take deltas, by name or all, out of memory; they are loaded again when needed. Raises DeltaSpecError."""
        self._libraries.drop(self._opened, self._known(names))
        return self

    def refresh(self, *names: str) -> LibraryView:
        """Take in deltas, by name or all, that were saved again since, and the names of new ones; forget those gone.

        A directory that is a link is followed anew. Raises UnknownDeltaError, DeltaSpecError: what is wrong with the
        directory; a delta that would change and is in use (DS532). Nothing changed then.
        """
        self._libraries.refresh(self._opened, names)
        return self

    @property
    def let_pass(self) -> Mapping[str, tuple[str, ...]]:
        """What `match` let pass, by the names of the deltas that it let pass with it."""
        return {name: entry.outcome.let_pass for name, entry in self._opened.entries.items() if entry.outcome.let_pass}

    def close(self) -> None:
        """Drop all and forget the names. Raises DeltaSpecError (DS532) where deltas are in use."""
        self._libraries.close(self._opened)

    def _known(self, names: tuple[str, ...]) -> tuple[str, ...]:
        require_known(names, self._opened.entries)
        return names or self.names

    def __contains__(self, name: object) -> bool:
        return name in self._opened.entries

    def __len__(self) -> int:
        return len(self._opened.entries)

    def __iter__(self) -> Iterator[str]:
        return iter(self._opened.entries)

    def __repr__(self) -> str:
        opened = self._opened
        limit = "" if opened.count is None and opened.size is None else f", limit {opened.count or opened.size}"
        return f"<library {opened.directory}: {len(opened.entries):,} deltas, {len(opened.loaded):,} loaded{limit}>"


def open_view(
    libraries: Libraries,
    directory: Any,
    names: tuple[str, ...],
    limit: int | str | None,
    preload: bool,
    by: str,
    example_inputs: Any,
    match: Match,
) -> LibraryView:
    """Open a directory for a user; where preloading fails, it is not opened."""
    opened = libraries.open(directory, names, limit, by, example_inputs, match, preload=preload)
    return LibraryView(libraries, opened)
