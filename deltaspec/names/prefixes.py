"""The same modules under other names: what stands before them in one model, and what in another."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass

from deltaspec.names.paths import below, is_inside


@dataclass(frozen=True, slots=True)
class Prefix:
    """A module of a saved model, and the module here that is the same: `bert` there may be the root here."""

    saved: str = ""
    here: str = ""

    @property
    def changes(self) -> bool:
        """Return whether names read differently here."""
        return self.saved != self.here

    def to_here(self, name: str) -> str | None:
        """Return what a saved name is here; None for one outside of the module."""
        return _moved(name, self.saved, self.here)

    def to_saved(self, name: str) -> str | None:
        """Return what a name was in the saved model; None for one outside of the module."""
        return _moved(name, self.here, self.saved)

    def __str__(self) -> str:
        return f"{self.saved or 'the whole model'} of the saved model is {self.here or 'the whole model'} here"


def _moved(name: str, old: str, new: str) -> str | None:
    if not is_inside(name, old):
        return None
    rest = name[len(old) :].lstrip(".")
    return below(new, rest) if rest else new


def prefixes(sites: Iterable[str], here: Collection[str]) -> list[Prefix]:
    """Return under which names all these sites of a saved model may be found among the names here.

    As they were, first; then those that keep more of each name before those that keep less. No layer is taken for
    another one: what is cut off holds no index, or only that of the whole model in a sequence.
    """
    sites = list(sites)
    found = [Prefix()] if all(site in here for site in sites) else []
    if not sites or "" in sites:
        return found
    first = min(sites, key=len).split(".")
    for cut in range(len(first)):
        saved, tail = ".".join(first[:cut]), ".".join(first[cut:])
        if not all(is_inside(site, saved) and site != saved for site in sites):
            break
        if any(segment.isdigit() for segment in first[1:cut]):
            break
        for name in here:
            if name == tail or name.endswith("." + tail):
                prefix = Prefix(saved, name[: -len(tail)].rstrip("."))
                if prefix.changes and not _other_index(prefix) and all(prefix.to_here(site) in here for site in sites):
                    found.append(prefix)
    return found


def _other_index(prefix: Prefix) -> bool:
    """Return whether both end in an index, and not in the same."""
    ends = [name.rpartition(".")[2] for name in (prefix.saved, prefix.here)]
    return all(end.isdigit() for end in ends) and ends[0] != ends[1]
