"""Changes between a lock and the plan of today, one finding a change."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from deltaspec.diagnostics.findings import Diagnostic
from deltaspec.diagnostics.wording import counted
from deltaspec.language.conditions import shown_amount
from deltaspec.names.folding import shown, unfold

if TYPE_CHECKING:
    from deltaspec.planning.plan import Plan

_MOST_SITES = 1_000_000
_SLACK = 0.05
"""Part by which an estimate of memory may differ from the locked one."""
_HINT = "if the change is intended, run `deltaspec lock` and commit the file"
_WORDS = {"tensors": "tensors are", "params": "overridden are", "bypassed": "read without a call is"}


def lock_changes(plan: Plan, current: dict[str, Any], locked: dict[str, Any], lock_name: str) -> list[Diagnostic]:
    """Compare the content that the plan's lock would have with the one that it has; both as JSON data.

    Raises ValueError where the locked names of sites cannot be read.
    """
    spec = plan.specs[0]
    found = [
        spec.diagnostic("DS512", message, (), f"take the model that was locked; {_HINT}")
        for message in _model_changes(locked["model"], current["model"], lock_name)
    ]
    for name in locked["deltas"].keys() - current["deltas"].keys():
        message = f"delta {name!r:.80} is in {lock_name} and no longer in the spec"
        found.append(spec.diagnostic("DS513", message, ("deltas",), _HINT, key=True))
    for own in plan.specs:
        for index, entry in enumerate(own.deltas):
            changes = _delta_changes(locked["deltas"].get(entry.name), current["deltas"][entry.name], lock_name)
            for code, message in changes:
                found.append(own.diagnostic(code, f"delta {entry.name!r}: {message}", ("deltas", index), _HINT))
    if found:
        return sorted(found, key=lambda d: (d.file, d.line, d.column))
    if list(locked["deltas"]) != list(current["deltas"]):
        message = f"the deltas apply in another order than in {lock_name}: {', '.join(current['deltas'])}"
        return [spec.diagnostic("DS513", message, ("deltas",), _HINT, key=True)]
    if locked["plan"] != current["plan"]:
        message = f"the deltas' tensors start in another way than in {lock_name}, or it was edited by hand"
        return [spec.diagnostic("DS516", message, ("deltas",), _HINT, key=True)]
    if locked["specs"] != current["specs"]:
        message = f"the spec is not the one that {lock_name} was made from, though the plan is the same"
        return [spec.diagnostic("DS517", message, (), _HINT)]
    return list(_memory_changes(plan, current.get("memory", []), locked.get("memory", []), lock_name))


def _memory_changes(plan: Plan, new: list[Any], old: list[Any], lock_name: str) -> Iterator[Diagnostic]:
    """Compare estimates: versions of libraries may move them a little."""
    if len(new) != len(old):
        yield plan.specs[0].diagnostic("DS508", f"{lock_name} has no estimate of the memory", ("expect",), _HINT)
    for spec, use, before in zip([s for s in plan.specs if s.expect and s.expect.memory], new, old, strict=False):
        if abs(use["bytes"] - before["bytes"]) > _SLACK * before["bytes"] or use["for"] != before["for"]:
            message = f"a step of training takes {shown_amount(use['bytes'])}, was {shown_amount(before['bytes'])}"
            yield spec.diagnostic("DS508", message, ("expect", "memory"), _HINT)


def _model_changes(old: dict[str, Any], new: dict[str, Any], lock_name: str) -> Iterator[str]:
    keys = [key for key in ("class", "type", "parameters") if old.get(key) != new[key]]
    for key in keys:
        noun = "number of parameters" if key == "parameters" else key
        yield f"the backbone's {noun} is {_shown(new[key])}, and {lock_name} was made for {_shown(old.get(key))}"
    if not keys and old.get("structure") != new["structure"]:
        yield f"the backbone's structure (names, classes, shapes, ties) is not the one that {lock_name} was made for"


def _delta_changes(old: dict[str, Any] | None, new: dict[str, Any], lock_name: str) -> Iterator[tuple[str, str]]:
    """Return code and message of each change of one delta."""
    if old is None:
        yield "DS513", f"it is not in {lock_name}"
        return
    for key in ("method", "derived", "attached", "seed", "dtype", "provenance", "train"):
        if (before := old.get(key)) != (after := new.get(key)):
            yield "DS514", f"{key} is {_shown(after)}, was {_shown(before)}"
    if old["method"] == new["method"]:
        for key in [*new["params"], *(key for key in old["params"] if key not in new["params"])]:
            if (before := old["params"].get(key)) != (after := new["params"].get(key)):
                yield "DS514", f"params.{key:.80} is {_shown(after)}, was {_shown(before)}"
    old_sites, new_sites = _sites(old), _sites(new)
    for names, verb in (
        ([name for name in new_sites if name not in old_sites], "new"),
        ([name for name in old_sites if name not in new_sites], "gone"),
    ):
        if names:
            yield "DS515", f"{counted(len(names), 'site')} {verb}: {shown(names, most=8)}"
    both = [name for name in new_sites if name in old_sites]
    yield from _group_changes(both, old_sites, new_sites)
    if old["trainable"] != new["trainable"]:
        yield "DS516", f"{new['trainable']:,} trainable parameters, was {old['trainable']:,}"


def _group_changes(
    names: Sequence[str], old: dict[str, dict[str, Any]], new: dict[str, dict[str, Any]]
) -> Iterator[tuple[str, str]]:
    """Return what changed at sites that stayed, sites with one change together."""
    changed: dict[tuple[str, str, str], list[str]] = {}
    for name in names:
        for key in _WORDS:
            before, after = old[name][key], new[name][key]
            if before != after:
                changed.setdefault((key, _shown(after), _shown(before)), []).append(name)
    for (key, after, before), where in changed.items():
        yield "DS516", f"{_WORDS[key]} {after}, was {before} ({counted(len(where), 'site')}: {shown(where)})"


def _sites(delta: dict[str, Any]) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}
    for group in delta["groups"]:
        found |= dict.fromkeys(unfold(group["at"], _MOST_SITES - len(found)), group)
    return found


def _shown(value: object) -> str:
    if value is None:
        return "absent"
    if isinstance(value, dict):
        return ", ".join(f"{key} {_shown(item)}"[:80] for key, item in list(value.items())[:8]) or "none"
    return json.dumps(value, ensure_ascii=False)[:80]
