"""The lock: a plan written down beside its spec, so that a review sees what a change does and CI sees drift."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deltaspec.diagnostics.findings import Diagnostic
from deltaspec.documents.atomic import write_atomically
from deltaspec.planning.lock_changes import lock_changes
from deltaspec.planning.planned import MemoryUse, PlannedDelta
from deltaspec.planning.text import groups, model_data

if TYPE_CHECKING:
    from deltaspec.language.model import DeltaEntry
    from deltaspec.planning.plan import Plan

VERSION = 1
_MAX_BYTES = 16 << 20
_FLAT = frozenset({"params", "specs", "derived", "provenance", "train", "base", "parents"})
"""Keys whose values stand on one line."""
_LOCK = {"specs": list, "model": dict, "deltas": dict, "sites": int, "trainable": int, "plan": str}
_DELTA = {"method": str, "attached": bool, "seed": int, "params": dict, "groups": list, "trainable": int}
_MEMORY = {"max": str, "for": dict, "bytes": int}
_GROUP = {"at": str, "tensors": dict, "params": dict, "bypassed": bool}


def lock_path(spec: str | os.PathLike[str]) -> Path:
    """Name the lock of a spec: `french.deltaspec.yaml` has `french.deltaspec.lock.json` beside it."""
    path = Path(spec)
    return path.with_name(path.name.removesuffix(path.suffix) + ".lock.json")


def lock(plan: Plan, lineage: Mapping[str, Any] | None = None) -> str:
    """Write a plan as a lock file's text: JSON, the same for the same plan, one group of sites a line.

    `lineage`, of a delta that is saved: the base that it was trained on, and what it is derived from.
    """
    return lock_text(lock_data(plan), lineage)


def lock_text(data: dict[str, Any], lineage: Mapping[str, Any] | None = None) -> str:
    """Write the content of a lock as `lock` does."""
    return _pretty(data | ({} if lineage is None else {"lineage": lineage})) + "\n"


def lock_data(plan: Plan) -> dict[str, Any]:
    """Return the content of a plan's lock file."""
    entries = {entry.name: entry for spec in plan.specs for entry in spec.deltas}
    return {
        "lock": VERSION,
        "specs": [f"sha256:{spec.digest}" for spec in plan.specs],
        "model": model_data(plan),
        "deltas": {delta.name: _delta_data(delta, entries[delta.name]) for delta in plan.deltas},
        "sites": len(plan.sites),
        "trainable": plan.trainable,
        **({"memory": [_memory_data(use) for use in plan.memory if use is not None]} if plan.memory else {}),
        "plan": plan.fingerprint,
    }


def write_lock(plan: Plan, path: str | os.PathLike[str]) -> None:
    """Write a plan's lock file: the old one or the new one is there at any moment, never half of one."""
    write_atomically(Path(path), lock(plan).encode())


def check_lock(plan: Plan, path: str | os.PathLike[str]) -> list[Diagnostic]:
    """Compare a plan with a lock file; empty where `lock` would write the same content again.

    A missing or malformed file is a finding, too.
    """
    name = os.fspath(path)
    try:
        with open(name, "rb") as file:
            content = file.read(_MAX_BYTES + 1)
    except FileNotFoundError:
        hint = "run `deltaspec lock` and commit the file"
        return [Diagnostic("DS510", "there is no lock file", name, suggestion=hint)]
    except OSError as error:
        return [Diagnostic("DS510", f"the lock file cannot be read: {error.strerror}", name)]
    try:
        if len(content) > _MAX_BYTES:
            raise ValueError("it is too large")
        locked = _parsed(content)
        locked.pop("lineage", None)  # tells of what was saved, not of the spec
        for delta in locked["deltas"].values():  # and so does this, of files that were read
            delta.pop("let_pass", None)
        current = json.loads(lock(replace(plan, deltas=tuple(replace(d, let_pass=()) for d in plan.deltas))))
        changes = lock_changes(plan, current, locked, Path(name).name)
        locked |= {key: current[key] for key in ("memory",) if key in current}  # bytes may differ a little
    except (ValueError, RecursionError) as error:
        return [_malformed(name, str(error) if isinstance(error, ValueError) else "it is nested too deeply")]
    if not changes and locked != current:
        return [_malformed(name, "its numbers do not fit together")]
    return changes


def _malformed(name: str, reason: str) -> Diagnostic:
    hint = "resolve the conflict or remove the file, then run `deltaspec lock`"
    return Diagnostic("DS511", f"this is no lock file of deltaspec: {reason}", name, suggestion=hint)


def _parsed(content: bytes) -> dict[str, Any]:
    """Read a lock file and check the types of all that is compared. Raises ValueError."""
    data = json.loads(content.decode("utf-8"))
    if not isinstance(data, dict) or "lock" not in data:
        raise ValueError("the key 'lock' is missing")
    if data["lock"] != VERSION:
        raise ValueError(f"its format is {data['lock']!r:.40}, and this deltaspec writes {VERSION}")
    _typed(data, _LOCK, "")
    for delta_name, delta in data["deltas"].items():
        where = f"deltas.{delta_name:.80}"
        if not isinstance(delta, dict):
            raise ValueError(f"{where} is not a mapping")
        _typed(delta, _DELTA, where)
        for group in delta["groups"]:
            if not isinstance(group, dict):
                raise ValueError(f"{where}.groups holds something else than mappings")
            _typed(group, _GROUP, f"{where}.groups")
    for use in data.get("memory", ()):
        if not isinstance(use, dict):
            raise ValueError("memory holds something else than mappings")
        _typed(use, _MEMORY, "memory")
    return data


def _typed(data: dict[str, Any], kinds: Mapping[str, type], where: str) -> None:
    for key, kind in kinds.items():
        if not isinstance(data.get(key), kind):
            place = f"{where}.{key}" if where else key
            raise ValueError(f"{place} is missing or not of type {kind.__name__}")


def _delta_data(delta: PlannedDelta, entry: DeltaEntry) -> dict[str, Any]:
    return {
        "method": delta.method,
        **({} if delta.derived is None else {"derived": delta.derived.to_data()}),
        "attached": delta.attached,
        "seed": delta.seed,
        **({} if entry.dtype is None else {"dtype": entry.dtype}),
        **({"provenance": dict(entry.provenance)} if entry.provenance else {}),
        **({} if entry.train is None else {"train": entry.train.to_data()}),
        "params": delta.params.model_dump(mode="json"),
        "groups": [
            {
                "at": pattern,
                "sites": count,
                "tensors": {name: list(shape) for name, shape, _ in group.tensors},
                "params": group.params,
                "bypassed": group.bypassed,
            }
            for group in groups(delta)
            for pattern, count in group.patterns
        ],
        "sites": len(delta.sites),
        "trainable": delta.trainable,
        **({"let_pass": list(delta.let_pass)} if delta.let_pass else {}),
    }


def _memory_data(use: MemoryUse) -> dict[str, Any]:
    return {"max": use.most, "for": dict(use.conditions), "bytes": use.bytes}


def _pretty(value: object, indent: str = "") -> str:
    """Write JSON with one line for each innermost part: what `groups` holds, and values without mappings."""
    deeper = indent + "  "
    if isinstance(value, dict) and value:
        items: Iterable[str] = (
            f"{json.dumps(key)}: {_flat(item) if key in _FLAT else _pretty(item, deeper)}"
            for key, item in value.items()
        )
        return "{\n" + ",\n".join(deeper + item for item in items) + f"\n{indent}}}"
    if isinstance(value, list) and value:
        return "[\n" + ",\n".join(deeper + _flat(item) for item in value) + f"\n{indent}]"
    return _flat(value)


def _flat(value: object) -> str:
    return json.dumps(value, allow_nan=False)
