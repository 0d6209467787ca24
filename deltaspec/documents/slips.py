"""Slips of the pen that make no sense as YAML or JSON: the place that is wrong, and what stands there.

A parser stops where it can read no further, which is often lines below what its author did; here is what they did.
"""

from __future__ import annotations

import re
from typing import NamedTuple
from unicodedata import name

_BREAK = re.compile(r"\r\n|\n|\r")
_CONFLICT = re.compile(r"(<{7,}|>{7,}|\|{7,})(?: .*)?|(={7,})")
_COMMENT = re.compile(r"(?:^|(?<=\s))(//|/\*)")
_COMMENT_LINE = re.compile(r"\s*(//|/\*|<!--|--(?!-)|;|%)")
_ODD = "\u00a0\u00ad\u1680\u180e\u2000-\u200f\u202a-\u202f\u205f-\u2064\u2066-\u2069\u3000"
_ODD_SPACE = re.compile(f"[{_ODD}]")
_ODD_EDGE = re.compile(r"^[A-Za-z_-]*:?([^\S ])|([^\S ])$")
_DOUBLE, _SINGLE = "\u201c\u201d\u201e\u201f", "\u2018\u2019\u201a\u201b"
_WIDE = "\uff1a\uff0c\uff5b\uff5d\uff3b\uff3d\uff03"
_LOOKS_LIKE = dict.fromkeys(_DOUBLE, '"') | dict.fromkeys(_SINGLE, "'") | dict(zip(_WIDE, ":,{}[]#", strict=True))
_LIST_MARK = re.compile(r"\s*([•‣·–—−*-])(?=[\s\w\"'{\[])")
_NO_SPACE = re.compile(r"\s*(?:- +)*([A-Za-z_$][\w$-]*):(?=[^\s:/])")
_COMPLETE = re.compile(r"\s*(?:- +)*[^\s#][^#]*?:(?:\s|$)")
_AS_COMMENT = "a comment begins with #; quote it, if it is text"


class Slip(NamedTuple):
    """A slip and its place; line and column count from 0."""

    line: int
    column: int
    message: str
    suggestion: str | None


def split(text: str) -> list[str]:
    """Return the lines of a text, as the parsers count them."""
    return _BREAK.split(text)


def conflict(lines: list[str], within: bool) -> Slip | None:
    """Find the first mark of an unresolved merge.

    `within`: the document cannot be read, so a bare `=======`, and marks with white space before them, are marks too.
    """
    for number, line in enumerate(lines):
        found = _CONFLICT.fullmatch(line.strip() if within else line.rstrip())
        if found is not None and (found[1] or within):
            message = f"an unresolved merge conflict: {line.strip()[:60]}"
            hint = (
                "keep one of the two sides, and delete the lines that begin with <<<<<<<, |||||||, ======= and >>>>>>>"
            )
            return Slip(number, len(line) - len(line.lstrip()), message, hint)
    return None


def look_alike(character: str) -> Slip | None:
    """Name a character that is neither white space nor a sign, and looks like one."""
    if character and _ODD_SPACE.match(character):
        return Slip(0, 0, _not_space(character), _plain_space(character))
    if character in _LOOKS_LIKE:
        return Slip(0, 0, f"{_called(character)} is not {_LOOKS_LIKE[character]}", "type it anew")
    return None


def in_plain(text: str, is_key: bool) -> tuple[int, str, str] | None:
    """Find what makes a plain YAML value or key another one than was meant: (offset, message, way out)."""
    if (found := _COMMENT.search(text)) is not None:
        return found.start(1), f"{found[1]} begins no comment in YAML", _AS_COMMENT
    if (found := _ODD_EDGE.search(text)) is not None:
        odd = found[1] or found[2]
        return found.end() - 1, _not_space(odd), _plain_space(odd)
    if len(text) > 1 and text[0] in _DOUBLE + _SINGLE and text[-1] in _DOUBLE + _SINGLE:
        mark = _LOOKS_LIKE[text[0]]
        return 0, f"{_called(text[0])} does not quote", f"write {mark}{text[1:-1][:60]}{mark}"
    if re.match(r"-[\"'{\[]", text) or (is_key and re.match(r"-\w", text)):
        return 0, "a space is missing after the -", "begin each item with a hyphen and a space: - name: …"
    if is_key and (found := _NO_SPACE.match(text)) is not None:
        return found.end(), "a space is missing after the colon", f"write {found[1]}: {text[found.end() :][:40]}"
    return None


def in_line(lines: list[str], number: int) -> Slip | None:
    """Find a slip in a line at which, or below which, YAML could not be read further."""
    line = _uncommented(lines[number])
    bare = _QUOTED.sub(lambda quoted: "x" * len(quoted.group()), line)
    if (found := _COMMENT_LINE.match(bare) or _COMMENT.search(bare)) is not None:
        return Slip(number, found.start(1), f"{found[1]} begins no comment in YAML", _AS_COMMENT)
    if (found := _ODD_SPACE.search(bare)) is not None:
        return Slip(number, found.start(), _not_space(found.group()), _plain_space(found.group()))
    if (found := _NO_SPACE.match(line)) is not None:
        hint = f"write {found[1]}: {line[found.end() :].strip()[:40]}"
        return Slip(number, found.end(), "a space is missing after the colon", hint)
    if (found := _LIST_MARK.match(bare)) is not None and not (found[1] == "-" and bare[found.end() :][:1].isspace()):
        what = "a space is missing after the -" if found[1] == "-" else f"{_called(found[1])} begins no item of a list"
        return Slip(number, found.start(1), what, "begin each item with a hyphen and a space: - name: …")
    if bare.lstrip().startswith("```"):
        return Slip(number, 0, "a fence of Markdown", "delete the lines that begin with ```")
    for column, character in enumerate(bare):
        if character in _LOOKS_LIKE:
            return Slip(number, column, f"{_called(character)} is not {_LOOKS_LIKE[character]}", "type it anew")
    return None


def last_quoted(lines: list[str], before: tuple[int, int]) -> tuple[tuple[int, int], tuple[int, int]] | None:
    """Return the last text in quotes that ends before a place: (start, end)."""
    text = "\n".join([*lines[: before[0]], lines[before[0]][: before[1]] if before[0] < len(lines) else ""])
    last = None
    for found in _QUOTED_OR_COMMENT.finditer(text):
        last = found if found.group()[0] != "#" else last
    if last is None:
        return None
    return _place(text, last.start()), _place(text, last.end())


def unclosed(lines: list[str]) -> tuple[int, int] | None:
    """Return the place of the last bracket that nothing closes."""
    text = _QUOTED_OR_COMMENT.sub(lambda found: re.sub(r"[^\n]", " ", found.group()), "\n".join(lines))
    open_at: list[int] = []
    for found in re.finditer(r"[\[{]|[]}]", text):
        if found.group() in "[{":
            open_at.append(found.start())
        elif open_at:
            open_at.pop()
    return _place(text, open_at[-1]) if open_at else None


def above(lines: list[str], number: int) -> list[int]:
    """Return the lines whose text may run on into a line: itself, and those above up to one that is complete."""
    run = [number] if number < len(lines) else []
    for earlier in range(min(number, len(lines)) - 1, max(number - 20, 0) - 1, -1):
        if _uncommented(lines[earlier]).strip():
            run.append(earlier)
            if _COMPLETE.match(lines[earlier]):
                break
    return run[::-1]


_QUOTES_AROUND = r"""(?<![^\s\[{,:(])(?:"(?:[^"\\]|\\.)*+"|'(?:[^']|'')*+')"""
_QUOTED = re.compile(_QUOTES_AROUND)
_QUOTED_OR_COMMENT = re.compile(rf"{_QUOTES_AROUND}|(?<!\S)#[^\n]*", re.DOTALL)


def _place(text: str, offset: int) -> tuple[int, int]:
    return text.count("\n", 0, offset), offset - text.rfind("\n", 0, offset) - 1


def _uncommented(line: str) -> str:
    return re.split(r"(?:^|\s)#", line, maxsplit=1)[0].rstrip(" \t")


def _called(character: str) -> str:
    """Name a character that looks like another one."""
    return f"U+{ord(character):04X} {name(character, '')}".rstrip()


def _not_space(character: str) -> str:
    return f"{_called(character)} {'is no white space here' if character.isspace() else 'stands here'}"


def _plain_space(character: str) -> str:
    return "type a plain space in its place" if character.isspace() else "delete it: it does not show"
