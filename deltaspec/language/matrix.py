"""A matrix: one entry of a document stands for several deltas, one for each combination of the values it lists.

`matrix: {rank: [4, 8], train.lr: [1e-3, 3e-4]}` on `french` makes `french[rank=4,lr=1e-3]` and three more. The document
is written out before anything else reads it; what is found then in a value is told of the place where it is listed.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import product
from math import prod
from typing import Any

from deltaspec.diagnostics.findings import Diagnostic, Path
from deltaspec.diagnostics.wording import closest, show_value
from deltaspec.documents.document import Document
from deltaspec.language.checks.mistakes import unknown_key_hint
from deltaspec.language.derivation import DerivedParams
from deltaspec.language.training import Train
from deltaspec.methods.base import Method
from deltaspec.names.escaping import PLAIN_NAME

MOST = 256
"""Deltas that the matrices of a document come to at most."""
_MOST_VALUES = 200_000
"""Values of a document that is written out, at most."""
_HINT = "train."
_OTHER = re.compile(r"[^A-Za-z0-9_.+:%-]+", re.ASCII)
_LONG = 32
Axes = dict[str, list[tuple[int, Any]]]
"""What a matrix lists, by parameter or hint (`train.lr`): values, each with its place in the list."""


def written_out(document: Document, methods: Mapping[str, Method]) -> tuple[Document, list[Diagnostic]]:
    """Return a document without matrices, and the findings about those that it had.

    One whose form is wrong stays where it is, for the schema to refuse. Where only what it says is wrong, each value is
    written out once, and not each combination, so that everything else of the document is checked as well.
    """
    listed = document.data.get("deltas")
    if not isinstance(listed, list) or not any(isinstance(delta, dict) and "matrix" in delta for delta in listed):
        return document, []
    findings: list[Diagnostic] = []
    deltas: list[Any] = []
    places: dict[Path, Path] = {}
    matrices: dict[str, _Matrix] = {}
    made = values = 0
    for index, delta in enumerate(listed):
        path: Path = ("deltas", index)
        matrix = _followed(delta, matrices)
        if _is_well_formed(delta):
            axes, found = _checked(document, path, delta, methods)
            number = prod(map(len, axes.values()))
        elif matrix is not None:
            number, found = len(matrix.combinations), []
        else:
            findings += _lost(document, path, delta, listed)
            places["deltas", len(deltas)] = path
            deltas.append(delta)
            continue
        made, values = made + number, values + number * _size(delta)
        if made > MOST or values > _MOST_VALUES:
            much = f"{made:,} deltas; at most {MOST}" if made > MOST else f"{values:,} values; at most {_MOST_VALUES:,}"
            message, hint = f"the matrices come to {much} are allowed", "list fewer values, or write several specs"
            found.append(document.diagnostic("DS228", message, (*path, "matrix"), hint, key=True))
        if matrix is None:
            made -= number if found else 0
            matrix = matrices[delta["name"]] = _Matrix(path, axes, _combinations(axes, whole=not found))
        findings += found
        for point in matrix.combinations:
            place: Path = ("deltas", len(deltas))
            places[place] = path
            given = _given(delta, matrix, point, methods)
            for axis, n in given.items():
                places[*place, *_key(axis)] = (*matrix.path, "matrix", axis, matrix.axes[axis][n][0])
            deltas.append(_delta(delta, matrix, point, given))
    return replace(document, data={**document.data, "deltas": deltas}, places=places), findings


@dataclass(frozen=True, slots=True)
class _Matrix:
    """A matrix that can be written out."""

    path: Path
    """Path of its entry."""
    axes: Axes
    combinations: list[dict[str, int]]
    """By axis: which of its values."""


def _combinations(axes: Axes, whole: bool) -> list[dict[str, int]]:
    """Return all combinations; or, for one with something wrong in it, some in which each value is."""
    lengths = [*map(len, axes.values())]
    some = (tuple(min(n, size - 1) for size in lengths) for n in range(min(MOST, max(lengths, default=1))))
    return [dict(zip(axes, chosen, strict=True)) for chosen in (product(*map(range, lengths)) if whole else some)]


def _followed(delta: Any, matrices: Mapping[str, _Matrix]) -> _Matrix | None:
    """Return the matrix of another entry before it, where an entry names one: it has a delta for each of that's."""
    if not isinstance(delta, dict) or not isinstance(delta.get("matrix"), str) or not _is_plain(delta):
        return None
    return matrices.get(delta["matrix"])


def _lost(document: Document, path: Path, delta: Any, listed: list[Any]) -> Iterator[Diagnostic]:
    """Report an entry that names one without a matrix."""
    name = delta.get("matrix") if isinstance(delta, dict) else None
    if not isinstance(name, str) or not name:
        return
    entries = {d["name"] for d in listed if isinstance(d, dict) and isinstance(d.get("name"), str)}
    lists = {d["name"] for d in listed if _is_well_formed(d)}
    near = closest(name, lists)
    hint = "list that one before it" if name in lists else f'did you mean "{near}"?' if near else None
    what = "has no matrix of its own" if name in entries else "is no delta of this spec"
    message = f"{show_value(name)} comes after it" if name in lists else f"{show_value(name)} {what}"
    hint = hint or "name an entry with a matrix, or list values: matrix: {rank: [4, 8]}"
    yield document.diagnostic("DS228", message, (*path, "matrix"), hint)


def point(document: Document, index: int) -> dict[str, Any]:
    """Return the values that a delta of a written-out document has from a matrix; none where it is from none."""
    delta: Any = document.data["deltas"][index]
    inside = [path for path in document.places if path[:2] == ("deltas", index) and len(path) == 4]
    return {str(document.places[path][3]): delta[path[2]][path[3]] for path in inside}


def label(value: Any) -> str:
    """Write a value as a part of a name: `4`, `1e-3`, `true`, `q+v`."""
    if isinstance(value, bool) or value is None:
        return "null" if value is None else str(value).lower()
    if isinstance(value, list):
        return "+".join(map(label, value))
    if isinstance(value, dict):
        return "+".join(f"{label(key)}:{label(item)}" for key, item in value.items())
    text = _shortest(value) if isinstance(value, float) else str(value)
    return _OTHER.sub("-", text)[:_LONG]


def _shortest(number: float) -> str:
    """Write a number as an author would: the shorter one of `0.05` and `5e-2`, the first of equals."""
    plain = str(int(number)) if number.is_integer() and abs(number) < 1e16 else repr(number)
    short = next(text for digits in range(18) if float(text := f"{number:.{digits}e}") == number)
    mantissa, _, exponent = short.partition("e")
    scientific = f"{mantissa}e{int(exponent)}"
    return scientific if "e" in plain else min(plain, scientific, key=len)


def _is_well_formed(delta: Any) -> bool:
    """Return whether there are lists that can be written out; of another form, the schema says what is wrong."""
    if not isinstance(delta, dict) or not isinstance(delta.get("matrix"), dict) or not _is_plain(delta):
        return False
    lists = delta["matrix"].values()
    return bool(lists) and all(isinstance(listed, list) and listed for listed in lists)


def _is_plain(delta: dict[str, Any]) -> bool:
    """Return whether values of a matrix can be put into a delta, and behind its name."""
    named = isinstance(delta.get("name"), str) and re.search(PLAIN_NAME, delta["name"]) is not None
    return named and all(isinstance(delta.get(part, {}), dict) for part in ("params", "train"))


def _key(axis: str) -> tuple[str, str]:
    """Return where in a delta a matrix puts its values."""
    return ("train", axis.removeprefix(_HINT)) if axis.startswith(_HINT) else ("params", axis)


def _given(
    delta: dict[str, Any], matrix: _Matrix, point: dict[str, int], methods: Mapping[str, Method]
) -> dict[str, int]:
    """Return what of a combination a delta takes: all of its own; of another's the hints that it does not give."""
    if isinstance(delta["matrix"], dict):
        return point
    own = {f"{_HINT}{key}" for key in delta.get("train", {})}
    method = methods.get(delta["method"]) if isinstance(delta.get("method"), str) else None
    own |= {f"{_HINT}lr_ratio"} if method is None or not method.faster else set()
    hints = () if "from" in delta else (axis for axis in point if axis.startswith(_HINT))
    return {axis: point[axis] for axis in hints if axis not in own}


def _delta(delta: dict[str, Any], matrix: _Matrix, point: dict[str, int], given: dict[str, int]) -> dict[str, Any]:
    """Write out one delta of a matrix. Being alternatives, they start detached unless it says otherwise."""
    made = {"attached": False, **{key: value for key, value in delta.items() if key != "matrix"}}
    for axis, n in given.items():
        part, key = _key(axis)
        made[part] = {**made.get(part, {}), key: matrix.axes[axis][n][1]}
    keys = [_key(axis)[1] for axis in point]
    shown = {axis: key if keys.count(key) == 1 else axis for axis, key in zip(point, keys, strict=True)}
    values = ",".join(f"{shown[axis]}={label(matrix.axes[axis][n][1])}" for axis, n in point.items())
    made["name"] += f"[{values}]" if point else ""
    return made


def _checked(
    document: Document, path: Path, delta: dict[str, Any], methods: Mapping[str, Method]
) -> tuple[Axes, list[Diagnostic]]:
    """Return the axes of a matrix that can be written out, and what is wrong with it."""
    axes: Axes = {}
    findings: list[Diagnostic] = []
    for axis, values in delta["matrix"].items():
        place = (*path, "matrix", axis)
        if (wrong := _wrong_axis(document, place, axis, delta, methods)) is not None:
            findings.append(wrong)
            continue
        part, key = _key(axis)
        if key in delta.get(part, {}):
            message = f"{key} is in the matrix and in {part}, too"
            findings.append(document.diagnostic("DS228", message, place, "delete one of the two", key=True))
        findings += _repeated(document, place, values)
        first = {label(value): number for number, value in reversed([*enumerate(values)])}
        axes[axis] = [(number, values[number]) for number in sorted(first.values())]
    return axes, findings


def _repeated(document: Document, place: Path, values: list[Any]) -> Iterator[Diagnostic]:
    seen: dict[str, Any] = {}
    for number, value in enumerate(values):
        name = label(value)
        if not name or name in seen:
            same = name in seen and seen[name] == value
            twice = f"{show_value(value)} is listed twice" if same else None
            alike = f"{show_value(value)} cannot be told from another value in the name of a delta"
            hint = "delete one of the two" if same else "write a delta for each instead"
            yield document.diagnostic("DS228", twice or alike, (*place, number), hint)
        seen.setdefault(name, value)


def _wrong_axis(
    document: Document, place: Path, axis: str, delta: dict[str, Any], methods: Mapping[str, Method]
) -> Diagnostic | None:
    """Return what is wrong with a key of a matrix: that is a parameter of the method, or a hint for training."""
    derived = "from" in delta
    part, key = _key(axis)
    if part == "train":
        if derived:
            return document.diagnostic("DS228", "a derived delta is not trained", place, "delete it", key=True)
        known = tuple(Train.model_fields)
        if key in known:
            return None
        hint = unknown_key_hint(key, (*place[:2], "train"), known, {key: None})
        hint = hint.replace('mean "', f'mean "{_HINT}')
        return document.diagnostic("DS201", f"unknown key {show_value(axis)}", place, hint, key=True)
    method = methods.get(delta["method"]) if isinstance(delta.get("method"), str) else None
    if method is None and not derived:
        return None  # the schema says so
    fields = DerivedParams.model_fields if method is None or derived else method.Params.model_fields
    if axis in fields:
        return None
    message = f"unknown key {show_value(axis)}"
    if axis.removeprefix("params.") in fields:
        hint = f"parameters stand by themselves: write {axis.removeprefix('params.')}"
    elif axis in Train.model_fields and axis not in fields:
        hint = f"hints for training stand with train: {_HINT}{axis}"
    elif axis in ("train", "params", *_OWN):
        hint = f"a matrix lists parameters of the method ({', '.join(fields)}), and hints such as {_HINT}lr"
    else:
        hint = unknown_key_hint(axis, (*place[:2], "params"), tuple(fields), {axis: None}, method)
        near = closest(axis, [f"{_HINT}{name}" for name in Train.model_fields])
        hint = f'did you mean "{near}"?' if near and "did you mean" not in hint else hint
    return document.diagnostic("DS201", message, place, hint, key=True)


_OWN = ("name", "method", "from", "combine", "target", "overrides", "expect", "attached", "dtype", "provenance")
"""Keys of a delta that no matrix varies."""


def _size(value: Any) -> int:
    """Count the values of a part of a document."""
    waiting, count = [value], 0
    while waiting:
        part = waiting.pop()
        count += 1
        waiting += part.values() if isinstance(part, dict) else part if isinstance(part, list) else ()
    return count
