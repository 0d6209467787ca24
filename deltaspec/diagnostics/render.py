"""Findings as text, JSON, GitHub workflow commands and SARIF 2.1.0: from findings to a string.

`files` is the number of files looked at; `skipped` says what was not.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from json import dumps
from pathlib import Path
from typing import Any
from urllib.parse import quote

from deltaspec.diagnostics.clean import clean
from deltaspec.diagnostics.codes import CODES
from deltaspec.diagnostics.findings import Diagnostic, written
from deltaspec.diagnostics.places import in_repository
from deltaspec.diagnostics.wording import plural

GITHUB_LIMIT = 10
"""Annotations of one kind that GitHub shows for a step."""


def summary(diagnostics: Sequence[Diagnostic], files: int) -> str:
    """Write `3 files, 2 findings`."""
    findings = len(diagnostics)
    return f"{files} {plural(files, 'file')}, {findings} {plural(findings, 'finding')}"


def as_text(
    diagnostics: Sequence[Diagnostic], files: int | None = None, skipped: Sequence[str] = (), color: bool = False
) -> str:
    """Write findings for people: `file:line:col: error[DS302] …`, each with its help, and a summary."""
    styles = ("\x1b[1m{}\x1b[0m", "\x1b[1;31m{}\x1b[0m", "\x1b[36m{}\x1b[0m") if color else ()
    lines = [*(written(d, *styles) for d in diagnostics), *map(clean, skipped)]
    if files is not None:
        lines.append(summary(diagnostics, files))
    return "\n".join(lines)


def as_json(diagnostics: Sequence[Diagnostic], files: int | None = None, skipped: Sequence[str] = ()) -> str:
    """Write findings as one JSON object with the list `findings`, in ASCII, which every code page has."""
    findings = [
        {
            "code": d.code,
            "title": CODES.get(d.code, d.code),
            "message": d.message,
            "suggestion": d.suggestion,
            "file": d.file,
            "line": d.line or None,
            "column": d.column or None,
            "path": d.where or None,
        }
        for d in diagnostics
    ]
    report = {"files": files, "findings": findings}
    return dumps(report | ({"skipped": list(map(clean, skipped))} if skipped else {}), indent=2)


def as_github(diagnostics: Sequence[Diagnostic], files: int | None = None, skipped: Sequence[str] = ()) -> str:
    """Write findings as GitHub workflow commands, which become annotations of the changed lines."""
    lines = []
    for d in diagnostics:
        place = f"file={_property(in_repository(d.file))}"
        if d.line:
            place += f",line={d.line},col={d.column}"
        text = f"{d.message}\nhelp: {d.suggestion}" if d.suggestion else d.message
        lines.append(f"::error {place},title={_property(f'{d.code} {CODES.get(d.code, d.code)}')}::{_data(text)}")
    lines += map(clean, skipped)
    if files is not None:
        text = summary(diagnostics, files)
        if len(diagnostics) > GITHUB_LIMIT:
            text += f"; GitHub shows {GITHUB_LIMIT} of them, the log has them all"
            lines.insert(0, f"::notice title=deltaspec::{_data(text)}")
        else:
            lines.append(text)
    return "\n".join(lines)


def as_sarif(diagnostics: Sequence[Diagnostic], files: int | None = None, skipped: Sequence[str] = ()) -> str:
    """Write findings as SARIF 2.1.0, in ASCII: stable rule ids, URIs relative to the repository's root."""
    codes = sorted({d.code for d in diagnostics})
    rules = [{"id": code, "shortDescription": {"text": CODES.get(code, code)}} for code in codes]
    results = [
        {
            "ruleId": d.code,
            "ruleIndex": codes.index(d.code),
            "level": "error",
            "message": {"text": f"{d.message}\nhelp: {d.suggestion}" if d.suggestion else d.message},
            "locations": [{"physicalLocation": _location(d)}],
        }
        for d in diagnostics
    ]
    tool = {"driver": {"name": "deltaspec", "rules": rules}}
    run: dict[str, Any] = {"tool": tool, "columnKind": "unicodeCodePoints", "results": results}
    if skipped:
        notes = [{"level": "note", "message": {"text": clean(text)}} for text in skipped]
        run["invocations"] = [{"executionSuccessful": True, "toolExecutionNotifications": notes}]
    log = {"$schema": "https://json.schemastore.org/sarif-2.1.0.json", "version": "2.1.0", "runs": [run]}
    return dumps(log, indent=2)


FORMATS: Mapping[str, Callable[[Sequence[Diagnostic], int | None, Sequence[str]], str]] = {
    "text": as_text, "json": as_json, "github": as_github, "sarif": as_sarif,
}  # fmt: skip


def _data(text: str) -> str:
    """Escape the message of a workflow command."""
    return text.replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")


def _property(text: str) -> str:
    """Escape a property of a workflow command."""
    return _data(text).replace(":", "%3A").replace(",", "%2C")


def _location(d: Diagnostic) -> dict[str, Any]:
    relative = in_repository(d.file)
    absolute, inside = Path(relative).is_absolute(), {"uri": quote(relative), "uriBaseId": "%SRCROOT%"}
    location: dict[str, Any] = {"artifactLocation": {"uri": Path(relative).as_uri()} if absolute else inside}
    if d.line:
        location["region"] = {"startLine": d.line, "startColumn": d.column}
    return location
