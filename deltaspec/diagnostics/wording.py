"""Words that findings are said in: near misses, values and paths as a reader sees them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from json import dumps

from deltaspec.diagnostics.clean import clean


def closest(word: str, known: Iterable[str]) -> str | None:
    """Return the known word that `word` is most likely a misspelling of; None where none is near."""
    candidates = {k.lower(): k for k in sorted(known, reverse=True)}
    found = get_close_matches(word[:100].lower(), list(candidates), n=1, cutoff=0.6)
    return candidates[found[0]] if found else None


def closest_delta(name: str, known: Iterable[str]) -> str | None:
    """Return the delta that a name is most likely meant for: the first of a matrix of that name, or a near one."""
    names = tuple(known)
    return next((one for one in names if one.startswith(f"{name}[")), None) or closest(name, names)


def plural(number: int, noun: str) -> str:
    """Return the form of a noun for a number: `site`, `sites`."""
    return noun if number == 1 else f"{noun}s"


def counted(number: int, noun: str) -> str:
    """Write `1 site`, `12 sites`, `1,200 sites`."""
    return f"{number:,} {plural(number, noun)}"


def one_line(text: str, most: int = 300) -> str:
    """Write a text of somebody else, such as an exception's, on one line and not longer than this."""
    text = " ".join(text.split())
    return text if len(text) <= most else f"{text[: most - 1]}…"


def brief(error: BaseException) -> str:
    """Write an exception of somebody else's code on one line: its kind, and what it says, if anything."""
    return one_line(f"{type(error).__name__}: {error}" if str(error).strip() else type(error).__name__)


def show_path(path: Sequence[str | int]) -> str:
    """Write a document path as `deltas[0].target.path`."""
    text = ""
    for part in path:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else part
    return text


def show_value(value: object) -> str:
    """Write a document's value for a message, shortened to 60 characters."""
    if isinstance(value, dict):
        return "a mapping"
    if isinstance(value, list):
        return "a list"
    if value is None:
        return "nothing (null)"
    text = dumps(value, ensure_ascii=False) if isinstance(value, str | bool) else str(value)
    text = clean(text[:61])
    return text if len(text) <= 60 else f"{text[:57]}…"
