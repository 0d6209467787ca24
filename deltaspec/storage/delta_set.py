"""A set of deltas with all that restoring them takes, wherever it comes from: saved here, or by another library."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Mapping
from mmap import mmap
from pathlib import Path
from typing import Any

from torch import Tensor

from deltaspec.backbone.record import Record
from deltaspec.diagnostics.findings import DeltaSpecError, Diagnostic
from deltaspec.language.model import DeltaSpec
from deltaspec.names.folding import unfold
from deltaspec.planning.plan import Plan
from deltaspec.planning.planned import PlannedDelta

MANIFEST = "manifest.json"


def refuse_saved(folder: Path) -> None:
    """Raise DeltaSpecError (DS562) where a directory holds saved deltas, which what is written there would replace."""
    if (folder / MANIFEST).exists():
        hint = "give another directory, one for each adapter, or delete what is there first"
        raise DeltaSpecError([Diagnostic("DS562", "holds saved deltas", file=str(folder), suggestion=hint)])


class DeltaSet(ABC):
    """Deltas with all that restoring them takes: a manifest, and three contents of each."""

    def __init__(self, folder: Path, manifest: dict[str, Any]) -> None:
        self.folder = folder
        self.manifest = manifest
        self.entries: list[dict[str, Any]] = self.manifest["deltas"]
        self.entry = {entry["name"]: entry for entry in self.entries}
        """Entries by the names of the deltas."""
        self.names = list(self.entry)
        self.attached: dict[str, float] = {
            name: self.manifest.get("strengths", {}).get(name, 1.0) for name in self.manifest["attached"]
        }
        """Names of the deltas that were attached, and their strengths."""

    notes: tuple[str, ...] = ()
    """What there is to say of all its deltas, wherever they are read."""
    compares = True
    """Whether it knows what its deltas depend on: the structure of their backbone, and its weights."""

    @abstractmethod
    def replaced(self) -> bool:
        """Return whether the deltas were saved again since: what was read of this set may be gone."""

    @abstractmethod
    def spec(self, name: str) -> DeltaSpec:
        """Read the spec that has a delta. Raises DeltaSpecError."""

    def planned(self, name: str) -> PlannedDelta | None:
        """Return what a delta is on the backbone at hand, where that is known already."""
        return None

    def way_in(self, name: str) -> str:
        """Return how a delta gets into a model that was compiled without it."""
        spec = self.folder / self.entry[name]["spec"]
        return f'c.add("{spec}"), then load; or c.library("{self.folder}"), to use it and not train it'

    @abstractmethod
    def keys(self, name: str) -> set[str] | None:
        """Return the names of the tensors that a file says it has, also where it is damaged behind that."""

    @abstractmethod
    def tensors(self, name: str, findings: list[Diagnostic]) -> dict[str, Tensor] | None:
        """Read a delta's tensors, its digest checked; None, with a finding, where that fails."""

    @abstractmethod
    def read(self, name: str, field: str) -> tuple[bytes | None, list[Diagnostic]]:
        """Read one of a delta's contents (`file`, `spec` or `lock`), its digest checked: (content, findings)."""

    @abstractmethod
    def map(self, name: str) -> tuple[mmap | None, list[Diagnostic]]:
        """Map a delta's tensors' file into memory, its digest checked: (content, findings).

        Writing to the content does not reach the file. `save` never writes into a file that is there, so the content
        stays what was checked, also when the deltas are saved again.
        """

    def renamed(self, name: str) -> Mapping[str, str]:
        """Return the names of a delta's tensors by those in the file that `map` gives; those left out are the same."""
        return {}

    def whole_plan(self, names: tuple[str, ...]) -> Plan | None:
        """Return the plan of these deltas on the backbone at hand, where it is known already."""
        return None

    def finding(self, code: str, message: str, suggestion: str | None = None, file: str = MANIFEST) -> Diagnostic:
        """Make a finding about one of its files."""
        return Diagnostic(code, message, file=str(self.folder / file), suggestion=suggestion)

    @property
    def has_record(self) -> bool:
        """Whether it says what its deltas depend on; earlier versions kept digests alone."""
        return "record" in self.manifest["backbone"]

    def record(self) -> Record:
        """Read the record of the backbone that the deltas were saved for. Raises DeltaSpecError (DS522)."""
        try:
            return Record.from_data(self.manifest["backbone"]["record"])
        except (ValueError, RecursionError) as error:
            raise DeltaSpecError([self.finding("DS522", f"is not a manifest: {error}", "save again")]) from error

    def groups(self, name: str) -> list[tuple[list[str], dict[str, Any]]]:
        """Return a delta's sites in the model that it was saved from, by the params that an override gave them.

        Raises DeltaSpecError where its lock, which says so, is damaged.
        """
        try:
            groups = self.locked(name)["deltas"][name]["groups"]
            return [(unfold(group["at"]), dict(group["params"])) for group in groups]
        except (ValueError, KeyError, TypeError) as error:
            raise DeltaSpecError([self.no_lock(name, error)]) from error

    def locked(self, name: str) -> dict[str, Any]:
        """Read the lock of a delta. Raises DeltaSpecError where it is damaged."""
        content, problems = self.read(name, "lock")
        if content is None:
            raise DeltaSpecError(problems)
        try:
            data = dict(json.loads(content))
            dict(data["deltas"][name])
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise DeltaSpecError([self.no_lock(name, error)]) from error
        return data

    def no_lock(self, name: str, error: Exception) -> Diagnostic:
        """Return the finding about a damaged lock."""
        return self.finding("DS522", f"is no lock: {error}", "save again", self.entry[name]["lock"])

    def sites(self, name: str) -> tuple[list[str], list[Diagnostic]]:
        """Return the FQNs of a delta's sites in the model that it was saved from: (names, findings)."""
        try:
            return [site for sites, _ in self.groups(name) for site in sites], []
        except DeltaSpecError as error:
            return [], list(error.diagnostics)
