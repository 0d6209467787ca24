"""The identity of a saved delta by its content: the same tensors, meaning and base have the same, under any name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from deltaspec.backbone.fingerprint import digest
from deltaspec.diagnostics.findings import DeltaSpecError
from deltaspec.methods.base import Method
from deltaspec.methods.registry import methods
from deltaspec.storage.delta_set import DeltaSet

MARK = "sha256:"
"""What every identity begins with."""
_MEANING = ("method", "derived", "params", "groups")
"""What a lock says of a delta that decides what its tensors mean, but for params of its start and of training."""


def identity(tensors: str, locked: Mapping[str, Any], base: str) -> str:
    """Return `sha256:…` of a delta: of the digest of its tensors' file, what its lock says of it, and its base."""
    meant = _but_passing(locked)
    return digest([tensors, [meant.get(key) for key in _MEANING], base])


def _but_passing(locked: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return what a lock says of a delta without the params that nothing trained depends on."""
    method = methods().get(locked.get("method", ""))
    if method is None or locked.get("derived") is not None:
        return locked
    groups = [{**group, "params": _kept(group["params"], method)} for group in locked["groups"]]
    return {**locked, "params": _kept(locked["params"], method), "groups": groups}


def _kept(params: Mapping[str, Any], method: Method) -> dict[str, Any]:
    return {key: value for key, value in params.items() if key not in method.passing}


def base_identity(backbone: Mapping[str, Any]) -> str:
    """Return `sha256:…` of a backbone as a manifest describes it: its structure, and the values that it was sampled by.

    What deltas put in the place of it, such as a head that every load draws anew, does not count.
    """
    record = backbone.get("record")
    if record is None:  # an earlier version's
        return digest([backbone["structure"], backbone["weights"]])
    kept = {name: sample for name, sample in record["tensors"].items() if name not in record["replaced"]}
    return digest([backbone["structure"], kept])


def identity_of(saved: DeltaSet, name: str) -> str:
    """Return a saved delta's identity, computed from what its files are, also where an earlier version wrote none.

    Raises DeltaSpecError where its lock is damaged, or the manifest says that it has another identity (DS522), or it
    was not saved by deltaspec (DS559).
    """
    if not saved.compares:
        message, hint = f"{name} has no identity: it was not saved by deltaspec", "deltaspec convert gives it one"
        raise DeltaSpecError([saved.finding("DS559", message, hint)])
    entry, locked = saved.entry[name], saved.locked(name)["deltas"][name]
    try:
        base = base_identity(saved.manifest["backbone"])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DeltaSpecError([saved.finding("DS522", f"has no record: {error}", "save again")]) from error
    try:
        found = identity(entry["file_sha256"], locked, base)
    except (KeyError, TypeError, AttributeError) as error:  # of groups and parameters, `locked` has read none
        raise DeltaSpecError([saved.no_lock(name, error)]) from error
    if entry.get("identity", found) != found:
        message = f"says that {name} is {entry['identity'][:19]}…, and its files make it {found[:19]}…"
        raise DeltaSpecError([saved.finding("DS522", message, "save the deltas again")])
    return found
