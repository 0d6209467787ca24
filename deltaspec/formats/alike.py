"""Adapters that differ from one that was read already in their values alone: a library of hundreds is mostly that."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from mmap import mmap
from pathlib import Path
from typing import Any

from torch import Tensor

from deltaspec.diagnostics.findings import DeltaSpecError, Diagnostic
from deltaspec.formats.received import ForeignSet, ReceivedSet, map_file
from deltaspec.formats.unread import Unread
from deltaspec.language.load import load
from deltaspec.language.model import DeltaSpec
from deltaspec.planning.planned import PlannedDelta


@dataclass(frozen=True, slots=True)
class Recipe:
    """How an adapter was read: what is the same for all that are alike."""

    first: ReceivedSet
    """The one that was read."""
    name: str
    """What its delta was called: its own deltas' names begin so."""
    specs: Mapping[str, dict[str, Any]]
    """Resolved specs of its deltas."""


def recipe_of(received: ReceivedSet, name: str) -> Recipe | None:
    """Return how an adapter was read; None where its tensors are not all in its file as they are, or not all of those.

    What was left out, such as a copy of the base's own table, was left out for its values: another's may differ.
    """
    renamed = {own: received.renamed(own) for own in received.names}
    if not all(keys and own.startswith(name) for own, keys in renamed.items()):
        return None
    used = {(received.file[own], theirs) for own, keys in renamed.items() for theirs in keys}
    if used != {*received.incoming.origin.values()} or len({*received.file.values()}) != 1:
        return None
    documents = {own: json.loads(received.read(own, "spec")[0] or b"") for own in received.names}
    return Recipe(received, name, documents)


class AlikeSet(ForeignSet):
    """An adapter that is read as another one was. Its values are checked when they are read."""

    def __init__(self, folder: Path, name: str, recipe: Recipe) -> None:
        self._recipe = recipe
        first = recipe.first
        self._theirs = {name + own[len(recipe.name) :]: own for own in first.names}
        """Names of the deltas in the recipe, by those here."""
        back = {own: here for here, own in self._theirs.items()}
        manifest = {
            "deltas": [{**entry, "name": back[entry["name"]]} for entry in first.entries],
            "attached": [back[own] for own in first.attached],
            "strengths": {back[own]: strength for own, strength in first.attached.items()},
        }
        super().__init__(folder, manifest)
        self.notes = first.notes
        [self._file] = {*first.file.values()}

    def spec(self, name: str) -> DeltaSpec:
        """Return the spec of one delta."""
        return load(self._document(name))

    def planned(self, name: str) -> PlannedDelta | None:
        """Return what a delta is planned as, under another name."""
        return self._recipe.first.planned(self._theirs[name])

    def keys(self, name: str) -> set[str] | None:
        """Return the names of a delta's tensors."""
        return set(self.renamed(name).values())

    def tensors(self, name: str, findings: list[Diagnostic]) -> dict[str, Tensor] | None:
        """Read a delta's tensors; None, with a finding, where that fails."""
        try:
            values = Unread(self.folder).tensors(self._file)
        except DeltaSpecError as error:
            findings += error.diagnostics
            return None
        return {key: values[theirs] for theirs, key in self.renamed(name).items() if theirs in values}

    def renamed(self, name: str) -> Mapping[str, str]:
        """Return the storage keys of a delta's tensors by their names in the adapter's file."""
        return self._recipe.first.renamed(self._theirs[name])

    def read(self, name: str, field: str) -> tuple[bytes | None, list[Diagnostic]]:
        """Return a delta's spec as it would lie on disk; of the others, which nothing here needs, none."""
        return (json.dumps(self._document(name)).encode() if field == "spec" else b""), []

    def map(self, name: str) -> tuple[mmap | None, list[Diagnostic]]:
        """Map the adapter's file into memory."""
        return map_file(self, self._file)

    def _document(self, name: str) -> dict[str, Any]:
        data = self._recipe.specs[self._theirs[name]]
        return {**data, "deltas": [{**data["deltas"][0], "name": name}]}
