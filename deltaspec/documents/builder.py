"""The part that the YAML and the JSON reader share: bounds, and the building of data with places."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any, NoReturn

from deltaspec.diagnostics.findings import DeltaSpecError, Diagnostic, in_order

MAX_DEPTH = 64
MAX_NODES = 10_000
MAX_NUMBER = 1 << 63
MAX_LITERAL = 40
"""Characters of a number literal."""
MAX_FINDINGS = 100

# C0 without tab, line feed and carriage return; DEL and C1; the line and paragraph separators, which YAML 1.1 and 1.2
# read differently; byte-order marks inside the text; surrogates and non-characters.
_BAD = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u2028\u2029\ufeff\ud800-\udfff\ufffe\uffff]")


@dataclass(slots=True)
class Mark:
    """Place of one value, and of the values in it. Lines and columns count from 1."""

    line: int
    column: int
    key: tuple[int, int] | None = None
    """Place of the key that it stands under."""
    children: dict[str | int, Mark] = field(default_factory=dict)


@dataclass(slots=True)
class _Frame:
    container: dict[str, Any] | list[Any]
    mark: Mark
    key: str | None = None
    key_place: tuple[int, int] | None = None
    awaits_value: bool = False


class Builder:
    """Builds data and marks from a parser's events; findings are kept until `finish`, fatal ones raise at once."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._findings: list[Diagnostic] = []
        self._frames: list[_Frame] = []
        self._root: Any = None
        self._root_mark: Mark | None = None
        self._nodes = 0

    def refuse(self, code: str, message: str, line: int, column: int, suggestion: str | None = None) -> None:
        """Keep a finding, and go on."""
        self._findings.append(Diagnostic(code, message, self.name, line, column, suggestion))
        if len(self._findings) >= MAX_FINDINGS:
            raise DeltaSpecError(in_order(self._findings))

    def stop(self, code: str, message: str, line: int, column: int, suggestion: str | None = None) -> NoReturn:
        """Raise all findings so far and this one."""
        self._findings.append(Diagnostic(code, message, self.name, line, column, suggestion))
        raise DeltaSpecError(in_order(self._findings))

    def stop_at(self, code: str) -> None:
        """Raise all findings so far, where one of them has this code."""
        if any(finding.code == code for finding in self._findings):
            raise DeltaSpecError(in_order(self._findings))

    @property
    def at_start(self) -> bool:
        """Whether nothing was built yet."""
        return self._root_mark is None

    @property
    def awaits_key(self) -> bool:
        """Whether the next value is a mapping's key."""
        return bool(self._frames) and isinstance(self._frames[-1].container, dict) and not self._frames[-1].awaits_value

    def begin(self, container: dict[str, Any] | list[Any], line: int, column: int) -> None:
        """Open a mapping or list."""
        if len(self._frames) >= MAX_DEPTH:
            self.stop("DS110", f"nested more than {MAX_DEPTH} levels deep", line, column)
        if self.awaits_key:
            self.stop("DS112", "a key must be a string, not a mapping or list", line, column, "quote it, if it is text")
        mark = Mark(line, column)
        self._place(container, mark)
        self._frames.append(_Frame(container, mark))

    def end(self) -> None:
        """Close the innermost mapping or list."""
        self._frames.pop()

    def value(self, value: Any, line: int, column: int) -> None:
        """Place a scalar: a key where a key is due."""
        if isinstance(value, str) and (found := bad_character(value)) is not None:
            self.refuse("DS104", found[1], line, column)
        if not self.awaits_key:
            self._place(value, Mark(line, column))
            return
        frame = self._frames[-1]
        frame.key, frame.key_place, frame.awaits_value = None, (line, column), True
        if not isinstance(value, str):
            shown = "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
            self.refuse("DS112", f"the key {shown} is not a string", line, column, f'quote it: "{shown}"')
        elif (first := frame.mark.children.get(value)) is not None:
            assert first.key is not None
            there = f"the first one stands at line {first.key[0]}, column {first.key[1]}"
            hint = "delete or rename one of the two"
            self.refuse("DS107", f"duplicate key {value[:60]!r}: {there}", line, column, hint)
        else:
            frame.key = value

    def finish(self) -> tuple[dict[str, Any], Mark]:
        """Return data and marks, or raise all findings."""
        mark, start = self._root_mark or Mark(1, 1), "a spec starts with: deltaspec: 1"
        if self._root is None:
            self.refuse("DS113", "the document is empty", 1, 1, start)
        elif not isinstance(self._root, dict):
            kind = "a list" if isinstance(self._root, list) else "a single value"
            self.refuse("DS114", f"a spec is a mapping, not {kind}", mark.line, mark.column, start)
        if self._findings:
            raise DeltaSpecError(in_order(self._findings))
        return self._root, mark

    def _place(self, value: Any, mark: Mark) -> None:
        self._nodes += 1
        if self._nodes > MAX_NODES:
            self.stop("DS102", f"more than {MAX_NODES} values", mark.line, mark.column, "is this really a spec?")
        if not self._frames:
            self._root, self._root_mark = value, mark
            return
        frame = self._frames[-1]
        if isinstance(frame.container, list):
            frame.mark.children[len(frame.container)] = mark
            frame.container.append(value)
            return
        frame.awaits_value = False
        if frame.key is not None:
            mark.key = frame.key_place
            frame.container[frame.key] = value
            frame.mark.children[frame.key] = mark


def bad_character(text: str) -> tuple[int, str] | None:
    """Find a character that no document may hold: its offset, and a message."""
    found = _BAD.search(text)
    if found is None:
        return None
    code = ord(found.group())
    if 0xD800 <= code <= 0xDFFF:
        return found.start(), f"U+{code:04X} is half of a surrogate pair"
    return found.start(), "a NUL character" if code == 0 else f"the character U+{code:04X} is not allowed"


def number(text: str, builder: Builder, line: int, column: int) -> int | float:
    """Read a decimal number literal; refuse absurd ones, and return 0 then."""
    if len(text) > MAX_LITERAL:
        builder.refuse("DS111", f"a number of {len(text)} characters", line, column, "quote it, if it is text")
        return 0
    if text.lstrip("+-").isdigit():
        whole = int(text)
        if abs(whole) < MAX_NUMBER:
            return whole
        builder.refuse("DS111", f"{text} does not fit into 64 bits", line, column)
        return 0
    real = float(text)
    if real in (float("inf"), float("-inf")):
        builder.refuse("DS111", f"{text} is too large for a double", line, column)
        return 0
    if real == 0 and text.lower().partition("e")[0].strip("+-0."):
        builder.refuse("DS111", f"{text} is too small for a double", line, column)
    return real
