"""Loading: from a file, text or data to a `DeltaSpec`, or to all findings at once."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from deltaspec.diagnostics.findings import Path
from deltaspec.documents.document import Document
from deltaspec.language.derivation import METHOD, DerivedParams
from deltaspec.language.migrate import migrate
from deltaspec.language.model import DeltaSpec
from deltaspec.language.params import read_params
from deltaspec.language.selectors import canonical
from deltaspec.language.validate import check_document, open_document
from deltaspec.methods.base import Method
from deltaspec.methods.declarations import MethodParams


def load(spec: str | os.PathLike[str] | Mapping[str, Any] | DeltaSpec) -> DeltaSpec:
    """Read and validate a spec: a file's path, or its content as a dict. Raises DeltaSpecError with all findings.

    >>> load({"deltaspec": 1, "deltas": [{"name": "d", "method": "lora", "target": "**.q"}]}).deltas[0].params.rank
    8
    """
    return spec if isinstance(spec, DeltaSpec) else parse(open_document(spec))


def parse(document: Document) -> DeltaSpec:
    """Validate a document. Raises DeltaSpecError with all findings."""
    document, known = check_document(document)
    return DeltaSpec.model_validate(_fields(migrate(document.data), known, document), context=document)


def _fields(data: Mapping[str, Any], known: Mapping[str, Method], document: Document) -> dict[str, Any]:
    """Bring a valid document into the fields of DeltaSpec."""
    fields: dict[str, Any] = {k: v for k, v in data.items() if k not in ("selectors", "deltas", "expect")}
    fields["selectors"] = {n: canonical(s, ("selectors", n)) for n, s in data.get("selectors", {}).items()}
    fields["deltas"] = tuple(
        _delta_fields(delta, ("deltas", index), DerivedParams if "from" in delta else known[delta["method"]].Params)
        for index, delta in enumerate(data["deltas"])
    )
    if document.places:  # some of its deltas are those of matrices
        from deltaspec.language.matrix import point

        fields["deltas"] = tuple(
            {**delta, "matrix": point(document, index)} for index, delta in enumerate(fields["deltas"])
        )
    if "expect" in data:
        fields["expect"] = _expect_fields(data["expect"])
    if isinstance(data.get("passes"), list):
        fields["passes"] = tuple(data["passes"])
    return fields


def _delta_fields(delta: dict[str, Any], path: Path, params: type[MethodParams]) -> dict[str, Any]:
    fields = {"method": METHOD, **delta, "params": read_params(params, delta.get("params", {}))}
    if "target" in delta:
        fields["target"] = canonical(delta["target"], (*path, "target"))
    fields["overrides"] = tuple(
        {**override, "match": canonical(override["match"], (*path, "overrides", index, "match"))}
        for index, override in enumerate(delta.get("overrides", ()))
    )
    if "expect" in delta:
        fields["expect"] = {key: _bounds(value) for key, value in delta["expect"].items()}
    return fields


def _expect_fields(expect: dict[str, Any]) -> dict[str, Any]:
    fields = dict(expect)
    if "trainable" in expect:
        fields["trainable"] = _bounds(expect["trainable"])
    if "memory" in expect:
        fields["memory"] = _memory_fields(expect["memory"])
    untouched = enumerate(expect.get("untouched", ()))
    fields["untouched"] = tuple(canonical(s, ("expect", "untouched", i)) for i, s in untouched)
    return fields


def _memory_fields(memory: Any) -> dict[str, Any]:
    if isinstance(memory, str):
        return {"max": memory}
    return {key: tuple(value) if isinstance(value, list) else value for key, value in memory.items()}


def _bounds(value: Any) -> Any:
    return {"min": value, "max": value} if isinstance(value, int) else value
