"""A spec that is added to others: its derived deltas may be built from theirs."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

from deltaspec.diagnostics.findings import DeltaSpecError, Diagnostic
from deltaspec.documents.document import Document
from deltaspec.language.load import load, parse
from deltaspec.language.model import DeltaSpec
from deltaspec.language.validate import open_document


def load_beside(
    spec: str | os.PathLike[str] | Mapping[str, Any] | DeltaSpec, others: Sequence[DeltaSpec]
) -> tuple[DeltaSpec, int]:
    """Load a spec that comes after others: (the spec, how many of the others stay apart from it).

    A delta is derived from deltas of its own spec. So where a source is in one of the others, that one and all after it
    are joined with the spec, into one. Raises DeltaSpecError with all findings; DS487 where they cannot be joined.
    """
    if isinstance(spec, DeltaSpec):
        return spec, len(others)
    document = open_document(spec)
    elsewhere = _sources(document.data) - {str(delta.get("name")) for delta in _deltas(document.data)}
    linked = [number for number, other in enumerate(others) if any(d.name in elsewhere for d in other.deltas)]
    if not linked:
        return parse(document), len(others)
    return load(_joined(document, others[linked[0] :])), linked[0]


def _deltas(data: Any) -> list[dict[str, Any]]:
    deltas = data.get("deltas") if isinstance(data, dict) else None
    return [delta for delta in deltas if isinstance(delta, dict)] if isinstance(deltas, list) else []


def _sources(data: Any) -> set[str]:
    return {str(name) for delta in _deltas(data) if isinstance(delta.get("from"), dict) for name in delta["from"]}


def _joined(document: Document, others: Sequence[DeltaSpec]) -> dict[str, Any]:
    """Return one document of all these specs, with the deltas in their order."""
    data: dict[str, Any] = document.data
    selectors, model = dict(data.get("selectors", {})), data.get("model")
    deltas: list[Any] = []
    findings: list[Diagnostic] = []

    def found(message: str, path: str, hint: str) -> None:
        findings.append(document.diagnostic("DS487", message, (path,), hint))

    if "expect" in data:
        message = "expectations of a whole spec cannot go with sources of another spec"
        found(message, "expect", "say what is expected of each delta")
    for other in others:
        written = other.to_data()
        if other.seed != data.get("seed", 0):
            message = f"its sources are in {other.name}, whose seed is {other.seed}, and this spec's is another"
            found(message, "seed", f"write seed: {other.seed}")
        if model is not None and "model" in written and written["model"] != model:
            found(f"its sources are in {other.name}, whose model is another", "model", "leave `model` out")
        model = written.get("model", model)
        for name, selector in written.get("selectors", {}).items():
            if selectors.setdefault(name, selector) != selector:
                message = f"its sources are in {other.name}, which has another selector named {name!r}"
                found(message, "selectors", "rename the selector")
        deltas += written["deltas"]
    if findings:
        raise DeltaSpecError(findings)
    rest = {"model": model} if model is not None else {}
    rest |= {"selectors": selectors} if selectors else {}
    return {**data, **rest, "deltas": [*deltas, *data["deltas"]]}
