"""Bring documents of older versions to the current one: pure functions from plain data to plain data."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from deltaspec.diagnostics.findings import Diagnostic
from deltaspec.diagnostics.wording import show_value
from deltaspec.documents.document import Document

CURRENT = 1
"""Version that this package writes."""

Migration = Callable[[dict[str, Any]], dict[str, Any]]

MIGRATIONS: Mapping[int, Migration] = {}
"""Migration from each older version to the next one; version 1 is the first."""


def migrate(data: dict[str, Any]) -> dict[str, Any]:
    """Return the document in the current version; the one given is not changed. Its version must be a known one."""
    version = data["deltaspec"]
    while version < CURRENT:
        data = {**MIGRATIONS[version](data), "deltaspec": version + 1}
        version += 1
    return data


def check_version(document: Document) -> list[Diagnostic]:
    """Return the finding about a version that cannot be read; none where it can, or where it is no number at all."""
    version = document.data.get("deltaspec")
    if isinstance(version, bool) or not isinstance(version, int | float) or version in (*MIGRATIONS, CURRENT):
        return []
    message = f"version {show_value(version)} of the format is not known; this deltaspec reads version {CURRENT}"
    hint = "upgrade deltaspec" if version > CURRENT else f"write deltaspec: {CURRENT}"
    return [document.diagnostic("DS207", message, ("deltaspec",), hint)]
