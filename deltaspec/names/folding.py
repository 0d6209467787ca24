"""Names folded over repeated layers, `encoder.layer.{0..11}.attention.{query,value}`, and unfolded again."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from itertools import product

_RESERVED = re.compile(r"[{},%]")
_GROUP = re.compile(r"\{([^{}]*)\}")
_RANGE = re.compile(r"(\d+)\.\.(\d+)")
_NUMBER = re.compile(r"0|[1-9][0-9]{0,17}")


def fold(names: Iterable[str]) -> list[str]:
    """Write dotted names as few patterns, in the order of their first names.

    Numbers between dots fold to `{0..3,7}`, last segments that share everything before them to `{query,value}`.
    `{`, `}`, `,` and `%` inside a name are percent-encoded, so that `unfold` gives back exactly these names.
    """
    ends: dict[tuple[str, ...], list[str]] = {}
    for pattern in _fold_numbers(dict.fromkeys(names)):
        *stem, last = pattern
        ends.setdefault(tuple(stem), []).append(last)
    folded = []
    for stem_parts, lasts in ends.items():
        plain = [last for last in lasts if not last.startswith("{")]
        if len(plain) > 1:
            lasts = ["{" + ",".join(plain) + "}", *(last for last in lasts if last.startswith("{"))]
        folded += [".".join((*stem_parts, last)) for last in lasts]
    return folded


def shown(names: Iterable[str], most: int = 3) -> str:
    """Fold names for a message; the first few patterns, and how many more there are."""
    patterns = [pattern or "the model itself" for pattern in fold(names)]
    more = f" and {len(patterns) - most} more" if len(patterns) > most else ""
    return ", ".join(patterns[:most]) + more


def unfold(pattern: str, limit: int = 1_000_000) -> list[str]:
    """Return the names that a folded pattern stands for. Raises ValueError for more than `limit` names."""
    parts = _GROUP.split(pattern)
    choices: list[Sequence[str]] = []
    size = 1
    for place, part in enumerate(parts):
        choice = [part] if place % 2 == 0 else _choices(part, limit)
        size *= len(choice)
        if size > limit:
            raise ValueError(f"{pattern!r} stands for more than {limit} names")
        choices.append(choice)
    return [_decoded("".join(chosen)) for chosen in product(*choices)]


def ranges(numbers: Iterable[int]) -> str:
    """Write numbers as ranges: 0, 1, 2, 7 as `0..2,7`."""
    runs: list[list[int]] = []
    for number in sorted(set(numbers)):
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ",".join(str(a) if a == b else f"{a}..{b}" for a, b in runs)


def _fold_numbers(names: Iterable[str]) -> list[tuple[str, ...]]:
    """Group the names that differ in numbers only, and fold each group."""
    groups: dict[tuple[str | None, ...], list[tuple[int, ...]]] = {}
    for name in names:
        segments = [None if _NUMBER.fullmatch(s) else _encoded(s) for s in name.split(".")]
        numbers = tuple(int(s) for s in name.split(".") if _NUMBER.fullmatch(s))
        groups.setdefault(tuple(segments), []).append(numbers)
    filled = ((template, iter(box)) for template, indices in groups.items() for box in _boxes(indices))
    return [tuple(next(numbers) if s is None else s for s in template) for template, numbers in filled]


def _boxes(indices: list[tuple[int, ...]]) -> list[tuple[str, ...]]:
    """Write a set of index tuples as products of ranges: equal continuations of different first indices share one."""
    if not indices[0]:
        return [()]
    below: dict[int, list[tuple[int, ...]]] = {}
    for first, *rest in indices:
        below.setdefault(first, []).append(tuple(rest))
    firsts: dict[tuple[tuple[str, ...], ...], list[int]] = {}
    for first, rests in below.items():
        firsts.setdefault(tuple(_boxes(rests)), []).append(first)
    return [
        (str(numbers[0]) if len(numbers) == 1 else "{" + ranges(numbers) + "}", *rest)
        for rests, numbers in firsts.items()
        for rest in rests
    ]


def _choices(text: str, limit: int) -> list[str]:
    found: list[str] = []
    for part in text.split(","):
        run = _RANGE.fullmatch(part)
        if run is None:
            found.append(part)
            continue
        low, high = int(run[1]), int(run[2])
        if len(found) + high - low + 1 > limit:
            raise ValueError(f"{{{text}}} stands for more than {limit} names")
        found += [str(number) for number in range(low, high + 1)]
    return found


def _encoded(segment: str) -> str:
    return _RESERVED.sub(lambda m: f"%{ord(m[0]):02X}", segment)


def _decoded(name: str) -> str:
    return re.sub(r"%([0-9A-F]{2})", lambda m: chr(int(m[1], 16)), name)
