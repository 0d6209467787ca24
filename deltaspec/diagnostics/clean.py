"""What may be printed: text of a document, a file's name or a model's names as a terminal and a log can show it."""

from __future__ import annotations

from typing import Any

_BLANK = "\u034f\u115f\u1160\u17b4\u17b5\u2800\u3164\uffa0"
"""Characters that Python counts as printable, and that show nothing."""


def clean(text: str, keep: str = "") -> str:
    r"""Return a text with everything escaped that acts, hides or does not show, but for the characters in `keep`.

    These are control characters (a terminal obeys ESC; a line feed forges a line of a log), what changes the direction
    of writing, what has no width, spaces other than the plain one, and halves of surrogate pairs. A clean text stays.

    >>> clean("a\x1b[31m b\u202e")
    'a\\x1b[31m b\\u202e'
    """
    if text.isprintable() and text.isascii():
        return text
    return "".join(c if _shows(c) or c in keep else c.encode("unicode_escape").decode("ascii") for c in text)


def clean_data(value: Any) -> Any:
    """Return JSON data with all of its texts clean, keys too."""
    if isinstance(value, str):
        return clean(value)
    if isinstance(value, dict):
        return {clean(key): clean_data(item) for key, item in value.items()}
    return [clean_data(item) for item in value] if isinstance(value, list | tuple) else value


def _shows(character: str) -> bool:
    return character.isprintable() and character not in _BLANK
