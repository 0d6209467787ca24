"""What a directory of saved deltas offers a model: their names, and whether they are for this backbone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from deltaspec.diagnostics.findings import DeltaSpecError, Diagnostic, require_known
from deltaspec.diagnostics.progress import tracked
from deltaspec.formats.base import Base
from deltaspec.formats.opening import adapters_in, format_of, open_set
from deltaspec.planning.plan import Plan
from deltaspec.runtime.copies import without_deltas
from deltaspec.runtime.ports import View
from deltaspec.storage.delta_set import MANIFEST, DeltaSet
from deltaspec.storage.identity import identity_of
from deltaspec.storage.matching import Match, Matcher, Outcome, present_of


@dataclass(frozen=True, slots=True)
class SavedDelta:
    """One saved delta."""

    name: str
    """Name that the model knows it by."""
    own: str
    """Name in the manifest."""
    saved: DeltaSet
    outcome: Outcome
    """What came of comparing the backbone with the one that it was saved for."""

    def is_as(self, other: SavedDelta | None) -> bool:
        """Return whether another entry has the same content in the same files."""
        if other is None or other.saved.folder != self.saved.folder or other.own != self.own:
            return False
        now: bool = self.saved.entry[self.own] == other.saved.entry[other.own]
        return now


def entries_in(
    root: Path, view: View, plan: Plan, by: str, names: Sequence[str], match: Match, inputs: Any
) -> dict[str, SavedDelta]:
    """Read the manifests of a directory written by `save`, or of all such directories in it, in their order.

    Raises DeltaSpecError with the findings of all: a manifest that is broken (DS521, DS522) or for another backbone
    (DS523), two deltas of one name (DS530), names that are not there (DS434).
    """
    folders = [root]
    if not (root / MANIFEST).exists() and root.is_dir() and format_of(root) is None:
        folders = adapters_in(root) or [root]
    base = cache(lambda: Base(without_deltas(view.host), inputs))
    matcher = Matcher(present_of(view, plan, inputs), match)
    findings: list[Diagnostic] = []
    found: dict[str, SavedDelta] = {}
    for folder in tracked(folders, "reading manifests", len(folders)):
        try:
            saved = open_set(folder, base)
            own_names = {own: _known_as(own, saved, by) for own in saved.names}
            wanted = [own for own, name in own_names.items() if not names or name in names]
            outcomes = matcher.outcomes(saved, wanted, findings)
        except DeltaSpecError as error:
            findings += error.diagnostics
            continue
        for own in wanted:
            name = own_names[own]
            if name in found and by != "identity":  # which is the same content, wherever it lies
                message = f"the delta {own!r} is in {found[name].saved.folder}, too"
                hint = 'name them by their directories: c.library(dir, by="folder")'
                findings.append(saved.finding("DS530", message, hint))
            found.setdefault(name, SavedDelta(name, own, saved, outcomes.get(own, Outcome())))
    if findings:
        raise DeltaSpecError(findings)
    require_known(names, found)
    return found


def _known_as(own: str, saved: DeltaSet, by: str) -> str:
    """Return the name that a model knows a saved delta by."""
    if by == "identity":
        return identity_of(saved, own)
    folder = saved.folder.name
    return own if by == "delta" else folder if len(saved.names) == 1 else f"{folder}/{own}"


@dataclass(frozen=True, slots=True)
class Source:
    """What a user opened, to be read again."""

    root: Path
    by: str
    names: tuple[str, ...]
    """Names that were asked for; empty: all."""
    match: Match

    def entries(self, view: View, plan: Plan, inputs: Any) -> dict[str, SavedDelta]:
        """Read what there is now; as `entries_in`."""
        return entries_in(self.root, view, plan, self.by, self.names, self.match, inputs)


def refuse_taken(entries: Mapping[str, SavedDelta], taken: Mapping[str, str | None]) -> None:
    """Raise DeltaSpecError (DS530) for names that a library has, by its directory, or a compiled delta (None)."""
    findings = []
    for name in (name for name in entries if name in taken):
        other = taken[name]
        where = "was compiled into this model" if other is None else f"is in the library {other}"
        message = f"the delta {name!r} of {entries[name].saved.folder} has the name of one that {where}"
        hint = 'name them by their directories: c.library(dir, by="folder")'
        if other is not None and entries[name].saved.folder.resolve().is_relative_to(Path(other).resolve()):
            hint = "the library is open: keep what c.library returned, and call its refresh(), or close() it first"
        elif other is not None:
            hint += "; or close the other library first"
        findings.append(entries[name].saved.finding("DS530", message, hint))
    if findings:
        raise DeltaSpecError(findings)
