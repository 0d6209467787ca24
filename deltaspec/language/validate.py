"""Validating a document: all findings about it. No torch, and no spec is built."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from deltaspec.diagnostics.findings import DeltaSpecError, Diagnostic, in_order
from deltaspec.documents.builder import MAX_FINDINGS
from deltaspec.documents.document import Document, from_bytes, from_data, read
from deltaspec.language.checks.tools import other_tool
from deltaspec.language.checks.whole import check
from deltaspec.language.migrate import check_version
from deltaspec.language.schema.accept import accepts, is_coded
from deltaspec.methods.registry import builtin_methods, methods

if TYPE_CHECKING:
    from deltaspec.methods.base import Method


def validate(spec: str | os.PathLike[str] | Mapping[str, Any] | Any) -> list[Diagnostic]:
    """Return all findings about a spec: a file's path, or its content as a dict. Empty where it is valid.

    A `DeltaSpec` was validated when it was made; there is one only where its module is loaded, with pydantic.
    """
    try:
        if isinstance(spec, Mapping | str | os.PathLike):
            check_document(open_document(spec))
        elif not isinstance(spec, getattr(sys.modules.get("deltaspec.language.model"), "DeltaSpec", ())):
            open_document(spec)  # raises TypeError
    except DeltaSpecError as error:
        return list(error.diagnostics)
    return []


def validate_content(content: bytes, name: str) -> list[Diagnostic]:
    """Return all findings about a spec whose bytes these are, and which findings call by this name."""
    try:
        check_document(from_bytes(content, name))
    except DeltaSpecError as error:
        return list(error.diagnostics)
    return []


def open_document(spec: str | os.PathLike[str] | Mapping[str, Any]) -> Document:
    """Read a document: a file's path, or its content as a dict. Raises DeltaSpecError where it cannot be read."""
    if isinstance(spec, Mapping):
        return from_data(spec)
    if not isinstance(spec, str | os.PathLike):
        raise TypeError(f"a spec is a path, a dict or a DeltaSpec, not {type(spec).__name__}")
    return read(spec)


def check_document(document: Document) -> tuple[Document, Mapping[str, Method]]:
    """Raise DeltaSpecError with all findings about a document.

    Where there are none, return it with its matrices written out, and the methods it may use.
    """
    if (finding := other_tool(document)) is not None:
        raise DeltaSpecError([finding])
    findings = check_version(document)
    if any(d.code == "DS207" for d in findings):
        raise DeltaSpecError(findings)
    known, problems = _known_methods(document)
    if any("matrix" in delta for delta in _entries(document)):
        from deltaspec.language.matrix import written_out

        document, wrong = written_out(document, known)
        problems += wrong
    if accepts(document.data):
        findings = in_order([*findings, *problems, *check(document, known, [], is_coded)])
    else:
        from deltaspec.language.checks.gate import gate

        refused = gate(document, known)
        findings = in_order([*findings, *problems, *refused, *check(document, known, refused, lambda _: True)])
    if len(findings) > MAX_FINDINGS:
        more = f"{len(findings) - MAX_FINDINGS} more findings are not shown"
        findings = [*findings[:MAX_FINDINGS], document.diagnostic("DS220", more)]
    if findings:
        raise DeltaSpecError(findings)
    return document, known


def _entries(document: Document) -> list[dict[str, Any]]:
    """Return the deltas of a document that are mappings."""
    deltas = document.data.get("deltas")
    return [delta for delta in deltas if isinstance(delta, dict)] if isinstance(deltas, list) else []


def _known_methods(document: Document) -> tuple[Mapping[str, Method], list[Diagnostic]]:
    """Return deltaspec's own methods; all installed ones only where the document needs them: that search is slow."""
    own = builtin_methods()
    if all(delta["method"] in own for delta in _entries(document) if isinstance(delta.get("method"), str)):
        return own, []
    try:
        return methods(), []
    except Exception as error:  # a plug-in's import can raise anything
        message = f"a method plug-in cannot be loaded: {type(error).__name__}: {error}"
        return own, [document.diagnostic("DS219", message, (), "repair or uninstall that package")]
