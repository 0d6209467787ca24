"""Strict JSON (RFC 8259), without recursion, with the place of every value."""

from __future__ import annotations

import re
from bisect import bisect_right
from json.decoder import JSONDecodeError, scanstring  # type: ignore[attr-defined]
from typing import Any, NoReturn

from deltaspec.documents.builder import Builder, number
from deltaspec.documents.slips import Slip, conflict, look_alike, split

_SPACE = re.compile(r"[ \t\n\r]*")
_NUMBER = re.compile(r"-?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?(?:[eE][-+]?[0-9]+)?")
_WORD = re.compile(r"[-+\w.]+")
_WORDS = {"true": True, "false": False, "null": None}
_SINGLE = "JSON strings have double quotes"
_NO_COMMENTS = "JSON has no comments; use YAML (.deltaspec.yaml) for them"


def feed(text: str, builder: Builder) -> None:
    """Parse JSON into the builder. Raises DeltaSpecError at the first malformed place."""
    _Reader(text, builder).run()


class _Reader:
    def __init__(self, text: str, builder: Builder) -> None:
        self._text = text
        self._builder = builder
        self._at = 0
        self._lines = [0, *(found.end() for found in re.finditer(r"\r\n|\n|\r", text))]
        self._open: list[str] = []
        self._places: list[int] = []
        """Where each of them was opened."""
        self._end = 0
        """End of the last value."""
        self._fresh = False

    def run(self) -> None:
        if not self._peek():
            return
        self._value()
        while self._open:
            self._step()
        if self._peek():
            hint = "put each spec into its own file"
            self._fail("more text after the end of the document", "delete it" if self._peek() in "]},;" else hint)

    def _step(self) -> None:
        """Read the next item of the innermost list or mapping, or its end."""
        closing = self._open[-1]
        here = self._peek()
        empty = self._fresh
        self._fresh = False
        if here == closing:
            self._at += 1
            self._open.pop()
            self._places.pop()
            self._end = self._at
            self._builder.end()
            return
        if not empty:
            if here != ",":
                self._no_comma(here, closing)
            comma = self._at
            self._at += 1
            if self._peek() == closing:
                self._at = comma
                self._fail("a comma before the end of a list or mapping", "delete it")
        if closing == "}":
            if self._peek() != '"':
                hint = _SINGLE if self._peek() == "'" else 'write "key": value'
                hint = hint if self._peek() else self._not_closed() or hint
                self._fail(f"expected a key in double quotes, got {self._shown()}", hint)
            self._string()
            if self._peek() != ":":
                self._fail(f"expected ':' after the key, got {self._shown()}", 'write "key": value')
            self._at += 1
        self._value()

    def _value(self) -> None:
        here = self._peek()
        if here == "{" or here == "[":
            container: dict[str, Any] | list[Any] = {} if here == "{" else []
            self._builder.begin(container, *self._place(self._at))
            self._places.append(self._at)
            self._at += 1
            self._open.append("}" if here == "{" else "]")
            self._fresh = True
        elif here == '"':
            self._string()
        else:
            self._plain()

    def _string(self) -> None:
        place = self._place(self._at)
        try:
            value, self._at = scanstring(self._text, self._at + 1, True)
        except JSONDecodeError as error:
            if error.msg.startswith("Unterminated") or self._text[error.pos : error.pos + 1] in ("\n", "\r"):
                self._fail("a quote that is not closed in its line", "close it, or double a backslash before it")
            self._at = min(error.pos, max(len(self._text) - 1, 0))
            hint = "write \\t for a tab" if self._text[self._at] == "\t" else None
            self._fail(error.msg[:1].lower() + error.msg[1:].removesuffix(" at").removesuffix(" starting"), hint)
        self._end = self._at
        self._builder.value(value, *place)

    def _plain(self) -> None:
        word = _WORD.match(self._text, self._at)
        text = word.group() if word else ""
        place = self._place(self._at)
        if text in _WORDS:
            self._builder.value(_WORDS[text], *place)
        elif _NUMBER.fullmatch(text):
            self._builder.value(number(text, self._builder, *place), *place)
        elif text.lstrip("+-").lower() in ("nan", "infinity", "inf"):
            self._builder.refuse("DS111", f"{text} is not a finite number", *place)
            self._builder.value(0, *place)
        else:
            hint = _SINGLE if text or self._peek() == "'" else "write a value, or delete what stands before"
            hint = hint if self._peek() else self._not_closed() or hint
            if text.lower() in _WORDS or text == "None":
                hint = f"write {'null' if text == 'None' else text.lower()}"
            self._fail(f"expected a value, got {self._shown()}", hint)
        self._at += len(text)
        self._end = self._at

    def _no_comma(self, here: str, closing: str) -> NoReturn:
        """Refuse what stands where a comma or the end was due."""
        if here.isalnum() or (here and here in '"{[-'):
            self._at = self._end
            self._fail("a comma is missing here", "write one after the value")
        hint = self._not_closed() if not here or here in "]}" else _SINGLE if here == "'" else None
        self._fail(f"expected ',' or '{closing}', got {self._shown()}", hint)

    def _not_closed(self) -> str | None:
        """Say which bracket is open, where the document ends."""
        if not self._places:
            return None
        line, column = self._place(self._places[-1])
        return f"close the {self._text[self._places[-1]]} of line {line}, column {column}, with {self._open[-1]}"

    def _misread(self) -> Slip | None:
        """Return what stands here where it is no JSON at all: a comment, a space or quote of another kind."""
        rest = self._text[self._at : self._at + 3]
        if rest.startswith(("//", "/*", "#", "<!--")):
            return Slip(0, 0, "a comment", _NO_COMMENTS)
        if rest == "```":
            return Slip(0, 0, "a fence of Markdown", "delete the lines that begin with ```")
        return look_alike(rest[:1])

    def _peek(self) -> str:
        """Skip white space, and return the next character; nothing at the end."""
        space = _SPACE.match(self._text, self._at)
        assert space is not None
        self._at = space.end()
        return self._text[self._at : self._at + 1]

    def _shown(self) -> str:
        word = _WORD.match(self._text, self._at)
        shown = word.group()[:40] if word else self._text[self._at : self._at + 1]
        return shown if shown else "the end of the document"

    def _place(self, offset: int) -> tuple[int, int]:
        line = bisect_right(self._lines, offset)
        return line, offset - self._lines[line - 1] + 1

    def _fail(self, message: str, suggestion: str | None = None) -> NoReturn:
        if (mark := conflict(split(self._text), within=True)) is not None:
            self._builder.stop("DS116", mark.message, mark.line + 1, mark.column + 1, mark.suggestion)
        if (slip := self._misread()) is not None:
            message, suggestion = slip.message, slip.suggestion
        self._builder.stop("DS106", f"malformed JSON: {message}", *self._place(self._at), suggestion)
