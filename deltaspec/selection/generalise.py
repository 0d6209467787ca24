"""Places of a model written as the shortest selector that means exactly these: by role, by path, over layers."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Sequence
from typing import Any

from deltaspec.backbone.table import ModuleTable, Row
from deltaspec.language.load import load
from deltaspec.names.patterns import compile_glob, fullmatch
from deltaspec.selection.select import select

Place = tuple[str, str | None]
"""FQN of a module, and the own name of one of its parameters, or None for the module."""
_NO_GLOB = re.compile(r"[*?\[\]{}()|\\^$+,\s]")
"""What a glob cannot hold as it is."""


def selector_of(places: Iterable[Place], table: ModuleTable, among: Collection[Place] | None = None) -> dict[str, Any]:
    """Return a selector, as a document writes it, that means these places and no others; with `among`, no others there.

    Of those that do, the one that a person would write: roles, roles in some layers, globs over all layers, globs in
    some layers, then names one by one. Raises ValueError for a place that the table does not have.
    """
    wanted = set(places)
    order = {row.fqn: number for number, row in enumerate(table.rows) if row.fqn}
    if lost := [fqn for fqn, _ in wanted if fqn not in order]:
        raise ValueError(f"no such module: {lost[0]!r}")
    if any(parameter is not None for _, parameter in wanted):
        return _by_parameter(sorted(wanted, key=lambda place: (order[place[0]], place[1] or "")), table)
    chosen = [table.rows[number] for number in sorted(order[fqn] for fqn, _ in wanted)]
    others = None if among is None else {fqn for fqn, _ in among}
    there = [row for row in table.rows if row.fqn and (others is None or row.fqn in others)]
    for make in (_by_role, _by_path):
        candidate = make(chosen, there)
        found = None if candidate is None else meant(candidate, table)
        if candidate is not None and found is not None and (found if among is None else found & {*among}) == wanted:
            return candidate
    return {"any": [_exact(row.fqn) for row in chosen]} if len(chosen) > 1 else _exact(chosen[0].fqn)


def meant(selector: dict[str, Any], table: ModuleTable) -> set[Place] | None:
    """Return the places that a selector means; None where there is a finding about it."""
    spec = load({"deltaspec": 1, "deltas": [{"name": "d", "method": "lora", "target": selector}]})
    assert spec.deltas[0].target is not None
    matches, findings = select(spec.deltas[0].target, table, spec.selectors, spec)
    return None if findings else {(match.row.fqn, match.parameter) for match in matches}


def _by_role(chosen: Sequence[Row], there: Sequence[Row]) -> dict[str, Any] | None:
    names = {row.fqn for row in chosen}
    layers = {row.layer for row in chosen}
    everywhere = _covering(chosen, [row for row in there if row.roles], names)
    if everywhere is not None:
        return {"role": _one_or_more(everywhere)}
    if None in layers:
        return None
    inside = [row for row in there if row.roles and row.layer in layers]
    some = _covering(chosen, inside, names)
    return None if some is None else {"role": _one_or_more(some), "layers": _layers(layers)}


def _covering(chosen: Sequence[Row], among: Iterable[Row], names: set[str]) -> list[str] | None:
    """Return the fewest roles whose modules are exactly the chosen ones; None where there are none such."""
    members: dict[str, set[str]] = {}
    for row in among:
        for role in row.roles:
            members.setdefault(role, set()).add(row.fqn)
    fitting = {role: fqns for role, fqns in members.items() if fqns <= names}
    left, found = set(names), list[str]()
    while left:
        best = max(fitting, key=lambda role: len(fitting[role] & left), default=None)
        if best is None or not fitting[best] & left:
            return None
        found.append(best)
        left -= fitting[best]
    order = {role: number for number, role in enumerate(role for row in chosen for role in row.roles)}
    return sorted(found, key=lambda role: order[role])


def _by_path(chosen: Sequence[Row], there: Sequence[Row]) -> dict[str, Any] | None:
    names = {row.fqn for row in chosen}
    if any(_NO_GLOB.search(name) for name in names):
        return None
    everything = [row.fqn for row in there]
    groups: dict[str, list[Row]] = {}
    for row in chosen:
        groups.setdefault(".".join("*" if s.isdigit() else s for s in row.fqn.split(".")), []).append(row)
    whole, parts = list[str](), list[dict[str, Any]]()
    for pattern, rows in groups.items():
        short = next((p for p in _suffixes(pattern) if _matches(p, everything) <= names), None)
        if short is not None and _matches(short, everything) >= {row.fqn for row in rows}:
            whole.append(short)
            continue
        layers = {row.layer for row in rows}
        if "*" in pattern and None not in layers:
            parts.append({"path": pattern, "layers": _layers(layers)})
        else:
            parts += [_exact(row.fqn) for row in rows]
    kept = _needed(whole, everything)
    if kept:
        parts.insert(0, {"path": _one_or_more(kept)})
    return parts[0] if len(parts) == 1 else {"any": _joined(parts)}


def _suffixes(pattern: str) -> Iterable[str]:
    """Yield globs from the shortest: `**.query`, `**.self.query`, …, the pattern itself."""
    segments = pattern.split(".")
    for count in range(1, len(segments)):
        if segments[-count] != "*":
            yield ".".join(("**", *segments[-count:]))
    yield pattern


def _needed(patterns: list[str], names: list[str]) -> list[str]:
    """Leave out the globs whose modules others mean as well."""
    kept = list(dict.fromkeys(patterns))
    for pattern in list(kept):
        others = set().union(*(_matches(other, names) for other in kept if other != pattern))
        if _matches(pattern, names) <= others:
            kept.remove(pattern)
    return kept


def _joined(parts: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Write globs in the same layers as one part."""
    groups: dict[str, dict[str, Any]] = {}
    for part in parts:
        before = groups.setdefault(str(part.get("layers")), {**part, "path": []})
        before["path"] += [part["path"]] if isinstance(part["path"], str) else part["path"]
    return [{**part, "path": _one_or_more(part["path"])} for part in groups.values()]


def _matches(pattern: str, names: Iterable[str]) -> set[str]:
    glob = compile_glob(pattern)
    return {name for name in names if fullmatch(glob, name)}


def _exact(fqn: str) -> dict[str, Any]:
    return {"regex": re.escape(fqn)} if _NO_GLOB.search(fqn) else {"path": fqn}


def _by_parameter(places: Sequence[Place], table: ModuleTable) -> dict[str, Any]:
    """Write parameters by their own names at the modules that own them; modules beside them as they are."""
    by_name: dict[str | None, list[str]] = {}
    for fqn, parameter in places:
        by_name.setdefault(parameter, []).append(fqn)
    parts = []
    for parameter, fqns in by_name.items():
        selector = selector_of([(fqn, None) for fqn in fqns], table)
        parts.append(selector if parameter is None else {**selector, "parameter": parameter})
    return parts[0] if len(parts) == 1 else {"any": parts}


def _layers(layers: Iterable[int | None]) -> Any:
    numbers = sorted(number for number in layers if number is not None)
    run = numbers == list(range(numbers[0], numbers[-1] + 1))
    return {"from": numbers[0], "to": numbers[-1]} if run and len(numbers) > 2 else numbers


def _one_or_more(words: Sequence[str]) -> Any:
    return words[0] if len(words) == 1 else list(words)
