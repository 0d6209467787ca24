"""Match module names: globs in linear time, regular expressions with a time limit."""

from __future__ import annotations

import re
import warnings
from dataclasses import dataclass
from functools import lru_cache
from math import prod
from re import _parser  # type: ignore[attr-defined]  # the only parser of this grammar
from time import process_time
from typing import Any, Literal

MAX_PATTERN = 500
MATCH_SECONDS = 0.25
_PROBE_SECONDS = 0.05
_PROBE_LENGTH = 120
_MAX_REPEAT = 1000
_MAX_COPIES = 10_000
"""The engine unrolls counted repeats when it compiles, nested ones as a product."""


class PatternError(ValueError):
    """A pattern that cannot be used, as text for its author. `suggestion` is the way out, if one is known."""

    def __init__(self, message: str, suggestion: str | None = None) -> None:
        super().__init__(message)
        self.suggestion = suggestion


class BacktrackingError(PatternError):
    """A regular expression that takes exponential or high polynomial time on some name."""


@dataclass(frozen=True, slots=True)
class Pattern:
    """A compiled glob or regular expression; match with `fullmatch`."""

    text: str
    kind: str
    """`path` or `regex`."""
    matcher: Any


def fullmatch(compiled: Pattern, name: str) -> bool:
    """Return whether the whole of a module's full name matches. Raises BacktrackingError after MATCH_SECONDS."""
    if compiled.kind == "path":
        return compiled.matcher.fullmatch(f"{name}." if name else "") is not None
    return _match(compiled.matcher, name, MATCH_SECONDS)


@lru_cache(maxsize=1024)
def compile_glob(text: str) -> Pattern:
    """Compile a path glob: `*` any part of one segment, `**` any number of whole segments (none, too).

    Raises PatternError. The root's name is empty: it has no segments, so only `**` matches it.

    >>> fullmatch(compile_glob("**.layer.*.fc2"), "encoder.layer.3.fc2")
    True
    """
    _check_text(text)
    if wrong := re.search(r"[?\[\]{}()|\\^$+,\s]", text):
        shown = wrong.group() if wrong.group().strip() else "white space"
        raise PatternError(f"{shown} means nothing in a path", "a path knows only * and **; use regex: for more")
    segments = text.split(".")
    for segment in segments:
        if not segment:
            raise PatternError("an empty segment (a dot too many)", "segments are separated by one dot each")
        if "**" in segment and segment != "**":
            near = re.sub(r"\*\*+", "*", segment)
            wide = segment.lstrip("*") if segment.startswith("**") else near
            hint = f"write {near}, or **.{wide or near}"
            raise PatternError(f"** must be a whole segment, not a part of {segment}", hint)
    # After a `**` the earliest place where the next segments fit is as good as any later one, so what comes before the
    # next `**` is an atomic group, tried once. The last run is anchored at the end. The same holds within a segment.
    runs: list[list[str]] = [[]]
    for segment in segments:
        if segment != "**":
            runs[-1].append(_segment(segment))
        elif runs[-1] or len(runs) == 1:
            runs.append([])
    pattern, *rest = ("".join(run) for run in runs)
    for run in rest[:-1]:
        pattern += f"(?>(?:[^.]+\\.)*?{run})"
    if rest:
        pattern += f"(?:[^.]+\\.)*{rest[-1]}"
    return Pattern(text, "path", re.compile(pattern))


@lru_cache(maxsize=1024)
def compile_regex(text: str, probe: bool = True) -> Pattern:
    """Compile a regular expression that must match a whole name. Raises PatternError, BacktrackingError.

    `probe` tries it on a few names that it nearly matches, at a cost of at most a few tenths of a second.
    """
    _check_text(text)
    import regex  # type: ignore[import-untyped,unused-ignore]  # slow to import, and few specs need it

    counts = [int(n) for n in re.findall(r"\d+", " ".join(re.findall(r"\{[\d,\s]*\}", text))) if len(n) < 10]
    longest = re.search(r"\{[\d,\s]*\d{10}", text)
    if longest or max(counts, default=0) > _MAX_REPEAT or prod(c for c in counts if c) > _MAX_COPIES:
        raise PatternError("a repeat count that is too large", f"no name needs it: * or +, or at most {_MAX_REPEAT}")
    try:
        with warnings.catch_warnings(action="ignore"):  # of syntax that a later version may read differently
            compiled = regex.compile(text)
    except regex.error as error:
        message = f"{error.msg} (character {error.pos + 1})" if error.pos is not None else str(error.msg)
        hint = "begin with .* to match any start" if text.startswith("*") else None
        raise PatternError(message, hint) from None
    except (OverflowError, RecursionError, ValueError, IndexError, KeyError, TypeError, AttributeError) as error:
        raise PatternError(f"the engine cannot compile it ({type(error).__name__})") from None
    hint = "let each repeat end in something that the repeat itself cannot match, as in (?:[a-z]+\\.)*"
    if nested := _nested_repeat(text):
        raise BacktrackingError(f"it backtracks without end on some names: {nested}", hint)
    end = process_time() + 4 * _PROBE_SECONDS
    for name in _probes(text) if probe else ():
        try:
            _match(compiled, name, _PROBE_SECONDS)
        except BacktrackingError:
            raise BacktrackingError(f"it backtracks without end on some names, such as {name[:20]!r}…", hint) from None
        if process_time() > end:
            raise BacktrackingError("it is too slow", hint)
    return Pattern(text, "regex", compiled)


def matched(how: Literal["match", "fullmatch", "search"], text: str, name: str) -> Any:
    """Match a regular expression of another library's files as `re` does; None where it does not match.

    Raises PatternError where it is none, BacktrackingError after MATCH_SECONDS.
    """
    try:
        return getattr(_as_given(text), how)(name, timeout=MATCH_SECONDS)
    except TimeoutError:
        raise BacktrackingError(f"{text[:60]!r} takes more than {MATCH_SECONDS} s on {name[:60]!r}") from None
    except (MemoryError, RecursionError):
        raise BacktrackingError(f"{text[:60]!r} takes too much memory on {name[:60]!r}") from None


@lru_cache(maxsize=4096)
def _as_given(text: str) -> Any:
    import regex

    try:
        with warnings.catch_warnings(action="ignore"):
            return regex.compile(text)
    except (regex.error, OverflowError, RecursionError, ValueError) as error:
        raise PatternError(f"{text[:60]!r} is no regular expression: {error}") from None


def _check_text(text: str) -> None:
    if not text:
        raise PatternError("it is empty")
    if len(text) > MAX_PATTERN:
        message = f"it has {len(text)} characters; at most {MAX_PATTERN} are allowed"
        raise PatternError(message, "use a list of patterns")


def _match(compiled: Any, name: str, seconds: float) -> bool:
    try:
        return compiled.fullmatch(name, timeout=seconds) is not None
    except TimeoutError:
        raise BacktrackingError(f"it takes more than {seconds} s on {name[:60]!r}") from None
    except (MemoryError, RecursionError):
        raise BacktrackingError(f"it takes too much memory on {name[:60]!r}") from None


def _segment(segment: str) -> str:
    """Translate one segment of a glob, with the dot that ends it."""
    first, *rest = (re.escape(literal) for literal in segment.split("*"))
    if not rest:
        return f"{first}\\."
    middle = "".join(f"(?>[^.]*?{literal})" for literal in rest[:-1])
    start = "" if first else "(?=[^.])"
    return f"{start}{first}{middle}[^.]*{rest[-1]}\\."


def _probes(text: str) -> list[str]:
    """Make names that the pattern nearly matches: its own characters, alone and in a row, over and over."""
    letters = sorted(set(re.findall(r"[A-Za-z0-9_.-]", re.sub(r"\\[A-Za-z]", "", text))))[:12]
    words = re.findall(r"[A-Za-z0-9_]+", re.sub(r"\\[A-Za-z]", " ", text))[:6]
    units = dict.fromkeys([*letters, "a", "1", ".", "_", *words, "".join(words)[:40], "a.", "a1", "layer.0."])
    return [(unit * _PROBE_LENGTH)[:_PROBE_LENGTH] + end for unit in units if unit for end in ("\x01", "")]


def _nested_repeat(text: str) -> str | None:
    """Find a repeat directly inside a repeat, with nothing between two rounds that would tell them apart.

    The engine survives some of these on some names by shortcuts of its own; a spec should not depend on them.
    """
    try:
        with warnings.catch_warnings(action="ignore"):
            tree = _parser.parse(text)
    except (re.error, RecursionError, OverflowError):
        return None  # grammar that only `regex` knows; the probes still apply
    return _search_repeats(tree, inside=False)


def _search_repeats(tree: Any, inside: bool) -> str | None:
    items = _flat(tree)
    for index, (kind, argument) in enumerate(items):
        if kind in ("MAX_REPEAT", "MIN_REPEAT"):
            body, unbounded = argument[2], argument[1] > 50
            if inside and unbounded:
                own = _characters(body)
                others = [_characters([o]) for i, o in enumerate(items) if i != index and _needed(o)]
                if all(own & other for other in others):
                    return "a repeat inside a repeat"
            if found := _search_repeats(body, inside=unbounded or inside):
                return found
        elif kind == "BRANCH":
            for branch in argument[1]:
                if found := _search_repeats(branch, inside and len(items) == 1):
                    return found
        elif kind in ("ASSERT", "ASSERT_NOT") and (found := _search_repeats(argument[1], inside=False)):
            return found
    return None


def _flat(tree: Any) -> list[tuple[str, Any]]:
    """Return the items of a sequence, with groups opened."""
    items: list[tuple[str, Any]] = []
    for kind, argument in tree:
        if str(kind) == "SUBPATTERN":
            items += _flat(argument[-1])
        else:
            items.append((str(kind), argument))
    return items


def _needed(item: tuple[str, Any]) -> bool:
    kind, argument = item
    if kind in ("MAX_REPEAT", "MIN_REPEAT", "POSSESSIVE_REPEAT"):
        return bool(argument[0] > 0 and argument[2].getwidth()[0] > 0)
    return kind not in ("AT", "ASSERT", "ASSERT_NOT")


_ASCII = frozenset(range(128))


def _characters(tree: Any) -> frozenset[int]:
    """Return the ASCII characters that a part of a pattern can consume; all of them where that is not plain."""
    found: set[int] = set()
    for kind, argument in _flat(tree):
        if kind == "LITERAL":
            found.add(argument)
        elif kind == "IN" or kind == "NOT_LITERAL":
            found |= _class(argument) if kind == "IN" else _ASCII - {argument}
        elif kind in ("MAX_REPEAT", "MIN_REPEAT", "POSSESSIVE_REPEAT"):
            found |= _characters(argument[2])
        elif kind == "BRANCH":
            found |= frozenset().union(*(_characters(branch) for branch in argument[1]))
        elif kind not in ("AT", "ASSERT", "ASSERT_NOT"):
            return _ASCII
    return frozenset(found)


def _class(items: Any) -> frozenset[int]:
    """Return the ASCII characters of a character class."""
    found: set[int] = set()
    negated = False
    for kind, argument in ((str(k), a) for k, a in items):
        if kind == "NEGATE":
            negated = True
        elif kind == "LITERAL":
            found.add(argument)
        elif kind == "RANGE":
            found |= _ASCII & frozenset(range(argument[0], min(argument[1], 127) + 1))
        else:
            name = str(argument).removeprefix("CATEGORY_")
            escape = {"DIGIT": r"\d", "SPACE": r"\s", "WORD": r"\w"}.get(name.removeprefix("NOT_"))
            if escape is None:
                return _ASCII
            escape = escape.upper() if name.startswith("NOT_") else escape
            found |= {c for c in _ASCII if re.match(escape, chr(c))}
    return _ASCII - found if negated else frozenset(found)
