"""Malformed YAML in its author's words: from where a parser stopped to where they went wrong."""

from __future__ import annotations

from typing import NoReturn

from yaml import YAMLError

from deltaspec.documents.builder import Builder
from deltaspec.documents.slips import Slip, above, conflict, in_line, in_plain, last_quoted, look_alike, unclosed

_Place = tuple[int, int]
"""Line and column, from 0."""


def explain(error: YAMLError, lines: list[str], builder: Builder) -> NoReturn:
    """Say where the author went wrong, as far as that can be told; else what the parser says, where it says it."""
    marked = getattr(error, "problem_mark", None) or getattr(error, "context_mark", None)
    problem = getattr(error, "problem", None) or "malformed"
    context = getattr(error, "context", None) or ""
    if "<block end>" in problem:  # the parser in Python says so for both
        problem = "expected '-'" if "collection" in context else "expected key"
    at = (marked.line, marked.column) if marked is not None else (0, 0)
    opened = getattr(error, "context_mark", None)
    start = (opened.line, opened.column) if opened is not None else at
    if (slip := conflict(lines, within=True)) is not None:
        builder.stop("DS116", slip.message, slip.line + 1, slip.column + 1, slip.suggestion)
    slip = (
        _quote(lines, at, start, problem, context)
        or _tab(lines, at)
        or _character(lines, at, context, problem)
        or _key(lines, at, start, problem)
        or _structure(lines, at, start, problem, context)
    )
    code = "DS108" if "duplicate" in problem and "directive" in problem else "DS105"
    if slip is None:
        message, hint = f"malformed YAML: {problem}" + (f" ({context})" if context else ""), None
        if "unknown escape" in problem:
            hint = "in double quotes a backslash begins an escape: use single quotes ('\\.'), or double it"
        elif "mapping values are not allowed" in problem:
            hint = "a value that holds ': ' must be quoted; keys of one mapping start in the same column"
        elif "expected" in problem:
            hint = (
                "check the indentation and the brackets; quote values that hold any of [ ] { } , # or start with * or !"
            )
        slip = Slip(at[0], at[1], message, hint)
    builder.stop(code, slip.message, slip.line + 1, slip.column + 1, slip.suggestion)


def _quote(lines: list[str], at: _Place, start: _Place, problem: str, context: str) -> Slip | None:
    """Find a quote that is not closed in its line, or that closes too early."""
    if "quoted scalar" in context:
        return Slip(start[0], start[1], *_UNCLOSED) if "end of stream" in problem or at[0] > start[0] else None
    if "alias" in context or "anchor" in context:
        at = start  # the parser has read its sign already
    last = last_quoted(lines, at)
    if last is None or last[1][0] != at[0] or _line(lines, at[0])[last[1][1] : at[1]].strip():
        return None
    if last[0][0] < last[1][0]:
        return Slip(last[0][0], last[0][1], *_UNCLOSED)
    rest = _line(lines, at[0])[at[1] :]
    if "flow" not in context and rest.startswith(":") and rest[1:].strip():
        return Slip(at[0], at[1] + 1, "a space is missing after the colon", f"write : {rest[1:].strip()[:40]}")
    if (odd := look_alike(rest[:1])) is not None:
        return odd._replace(line=at[0], column=at[1])
    if rest and rest[0] not in "]}:":
        comment = in_line(lines, at[0]) if rest.startswith(("//", "/*")) else None
        return comment or Slip(*at, "text after the quote that ends the value", _INSIDE)
    return None


def _tab(lines: list[str], at: _Place) -> Slip | None:
    line = _line(lines, at[0])
    indent = line[: len(line) - len(line.lstrip(" \t"))]
    if "\t" in indent:
        return Slip(at[0], indent.index("\t"), "a tab cannot indent YAML", "indent with spaces")
    return Slip(*at, "a tab cannot indent YAML", "indent with spaces") if line[at[1] : at[1] + 1] == "\t" else None


def _character(lines: list[str], at: _Place, context: str, problem: str) -> Slip | None:
    """Name a character that no plain value starts with."""
    line = _line(lines, at[0])
    if "alias" in context or "anchor" in context or "cannot start any token" in problem:
        sign = "*" if "alias" in context else "&" if "anchor" in context else line[at[1] : at[1] + 1]
        if sign in "`%" and (slip := in_line(lines, at[0])) is not None:
            return slip
        return Slip(*at, f"a plain value cannot start with {sign}", f"quote it: {_quoted(line, at[1])}")
    if "directive" in context and "duplicate" not in problem:
        return in_line(lines, at[0])
    return None


def _key(lines: list[str], at: _Place, start: _Place, problem: str) -> Slip | None:
    """Find the slip in a line that was to be `key: value`, and ran on into the next one."""
    unfinished = "expected ':'" in problem
    if not unfinished and "mapping values" not in problem and "expected key" not in problem and "'-'" not in problem:
        return None
    run = range(start[0], min(at[0], start[0] + 20) + 1) if unfinished else above(lines, at[0])
    for number in run:
        if number < len(lines) and (slip := in_line(lines, number)) is not None:
            return slip
    if unfinished:
        if (found := in_plain(_line(lines, start[0])[start[1] :], True)) is not None:
            return Slip(start[0], start[1] + found[0], found[1], found[2])
        shown = _line(lines, start[0])[start[1] :].strip()[:40]
        return Slip(*start, f"a key without a colon: {shown}", "write key: value, with a colon and a space")
    first = next((number for number in run if ":" not in lines[number]), at[0])
    if "mapping values" in problem and first < at[0]:
        column = len(lines[first]) - len(lines[first].lstrip(" -"))
        message = f"a key without a colon: {lines[first][column:].strip()[:40]}"
        return Slip(first, column, message, "write key: value, with a colon and a space")
    indent = len(line := _line(lines, at[0])) - len(line.lstrip(" "))
    if "mapping values" in problem and run[0] < at[0] and ":" not in line[indent : at[1]]:
        message = "this line is indented deeper than the one above, and so runs on from it"
        return Slip(at[0], indent, message, "indent the keys of one mapping alike")
    return None


def _structure(lines: list[str], at: _Place, start: _Place, problem: str, context: str) -> Slip | None:
    """Find brackets that are not closed, items of a list without a hyphen, and lines that fit none above."""
    line = _line(lines, at[0])
    if "flow" in context:
        if not line.strip() and (open_at := unclosed(lines)) is not None:
            start = open_at
        opening = _line(lines, start[0])[start[1] : start[1] + 1]
        if at[0] == start[0] and opening in ("[", "{") and line[at[1] : at[1] + 1] in ("]", "}"):
            return Slip(*start, f"the {opening} that opens here is not closed", f"close it before the {line[at[1]]}")
        if at[0] == start[0] or opening not in ("[", "{"):
            return in_line(lines, at[0]) if line else None
        if lines[start[0]].rstrip().endswith((",", "[", "{")) and line.strip():
            before = next(n for n in range(at[0] - 1, -1, -1) if lines[n].strip())
            if not lines[before].rstrip().endswith((",", "[", "{")):
                return Slip(before, len(lines[before].rstrip()), "a comma is missing here", "end the line with one")
            return in_line(lines, at[0])
        hint = f"close it with {']' if opening == '[' else '}'}, or write the comma that is missing"
        return Slip(*start, f"the {opening} that opens here is not closed", hint)
    if line[at[1] : at[1] + 1] in ("]", "}"):
        return Slip(*at, f"this {line[at[1]]} closes nothing", "delete it, or open it before")
    if line[: at[1]].strip() or not line.strip():
        return None
    if "'-'" in problem and at[1] == start[1]:
        return Slip(*at, "an item of a list without its -", "begin each item with a hyphen and a space: - name: …")
    if "'-'" in problem or "expected key" in problem:
        return Slip(*at, "the indentation of this line fits none above", "indent the keys of one mapping alike")
    return None


_UNCLOSED: tuple[str, str] = (
    "a quote that is not closed in its line",
    "close it; an apostrophe inside of single quotes is doubled: 'don''t'",
)


_INSIDE = "inside of a text, quotes are doubled ('don''t') or escaped (\"\\\"hi\\\"\"); or one is missing before"


def _line(lines: list[str], number: int) -> str:
    """Return a line; nothing after the last one, where parsers place the end."""
    return lines[number] if number < len(lines) else ""


def _quoted(line: str, column: int) -> str:
    """Return the plain value around a column in quotes."""
    start = max(line.rfind(opening, 0, column + 1) for opening in (" ", "[", "{", ",", "\t")) + 1
    rest = line[start:]
    for closing in (" #", ", ", "}", "]", ","):
        rest = rest.split(closing)[0]
    return f'"{rest.strip()[:60]}"'
