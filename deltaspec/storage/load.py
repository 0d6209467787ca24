"""Reading saved deltas into a compiled model: every key accounted for, all or nothing."""

from __future__ import annotations

import json
from collections.abc import Callable
from os import PathLike
from typing import Any, TypeVar

import torch
from torch import Tensor

from deltaspec.deltas.finite import is_finite, not_finite
from deltaspec.deltas.modules import Deltas
from deltaspec.diagnostics.findings import DeltaSpecError, Diagnostic
from deltaspec.methods.base import Method
from deltaspec.methods.registry import methods
from deltaspec.planning.plan import Plan
from deltaspec.runtime.active import Active
from deltaspec.storage.saved import SavedSet, without_values

_Read = TypeVar("_Read")


def load(active: Active, plan: Plan, deltas: Deltas, directory: str | PathLike[str]) -> None:
    """Read the tensors of all saved deltas into the deltas of the same names. All or nothing.

    Raises DeltaSpecError (DS521-DS529, DS534) with all findings, the model unchanged: files missing or damaged, another
    backbone, a delta that the model lacks or has with another method or other params, tensors missing, surplus, of
    another shape, of a dtype that would lose digits, or not finite; a model on the meta device.
    """
    settled(directory, lambda saved: fill(active, plan, deltas, saved))


def settled(directory: str | PathLike[str], read: Callable[[SavedSet], _Read]) -> _Read:
    """Read a set: the old one or the new one, where it is saved again meanwhile and the old one's files go."""
    while True:
        saved = SavedSet(directory)
        try:
            return read(saved)
        except DeltaSpecError:
            if not saved.replaced():
                raise


def fill(active: Active, plan: Plan, deltas: Deltas, saved: SavedSet) -> None:
    """Read the tensors of a set into the deltas of the same names. All or nothing, as `load`."""
    findings = saved.check_backbone(plan.structure, active.weights_fingerprint, plan.model_class)
    staged: list[tuple[Tensor, Tensor]] = []
    own = [delta.name for delta in plan.deltas]  # those of libraries are no place for other tensors
    for name in saved.names:
        findings += saved.read(name, "lock")[1]
        if name not in own:
            known = ", ".join(own)
            hint = f"it has: {known}; compile its spec too"
            findings.append(saved.finding("DS524", f"the model has no delta {name!r}", hint))
            continue
        findings += _other_meaning(saved, name, plan)
        tensors = dict(deltas[name].tensors())
        if any(value.is_meta for value in tensors.values()):
            findings.append(without_values(name, "loaded"))
        staged += match(saved, name, tensors, findings)
    if findings:
        raise DeltaSpecError(findings)
    with torch.no_grad():
        for target, value in staged:
            target.copy_(value)
    active.derived.refresh([delta.name for delta in plan.deltas])


def match(
    saved: SavedSet, name: str, targets: dict[str, Tensor], findings: list[Diagnostic]
) -> list[tuple[Tensor, Tensor]]:
    """Account for every key of one delta: (target, value) pairs, and a finding for each that does not fit."""
    values = saved.tensors(name, findings)
    if values is None:
        return []
    file = saved.entry[name]["file"]

    def found(code: str, message: str, suggestion: str) -> None:
        findings.append(saved.finding(code, message, suggestion, file))

    staged = []
    for key in sorted(targets.keys() - values.keys()):
        found("DS525", f"{name}: tensor {key} is missing", "the delta has sites that were not saved: compare the specs")
    for key in sorted(values.keys() - targets.keys()):
        found("DS525", f"{name}: tensor {key} fits nowhere", "the model's delta lacks this site: compare the specs")
    for key in sorted(values.keys() & targets.keys()):
        value, target = values[key], targets[key]
        if value.shape != target.shape:
            message = f"{name}: tensor {key} is {list(value.shape)}, the model's is {list(target.shape)}"
            found("DS526", message, "compare the params")
        elif not _fits(value.dtype, target.dtype):
            found("DS526", f"{name}: tensor {key} is {value.dtype}, the model's is {target.dtype}", "convert the model")
        elif not is_finite(value):
            findings.append(not_finite(name, key, str(saved.folder / file)))
        else:
            staged.append((target, value))
    return staged


def _other_meaning(saved: SavedSet, name: str, plan: Plan) -> list[Diagnostic]:
    """Compare a saved delta's spec with the model's: the same tensors mean something else under other params."""
    content, findings = saved.read(name, "spec")
    if content is None:
        return findings
    try:
        before = _meaning(json.loads(content), name)
    except (ValueError, KeyError, TypeError, AttributeError, StopIteration, RecursionError) as error:
        return [saved.finding("DS522", f"is no resolved spec: {error}", "save again", saved.entry[name]["spec"])]
    now = _meaning(plan.document(name), name)
    for key in sorted(before.keys() | now.keys()):
        if before.get(key) != now.get(key):
            message = f"{name}: {key} was {before.get(key)} when it was saved, the model's is {now.get(key)}"
            hint = "compile the saved spec, or deltaspec.restore(model, dir)"
            findings.append(saved.finding("DS529", message, hint, saved.entry[name]["spec"]))
    return findings


def _meaning(spec: dict[str, Any], name: str) -> dict[str, Any]:
    """Return what trained tensors depend on: the method and its params, but for those of training and the start."""
    delta = next(delta for delta in spec["deltas"] if delta["name"] == name)
    params = {f"params.{key}": json.loads(json.dumps(value)) for key, value in delta.get("params", {}).items()}
    rest = {key: json.loads(json.dumps(delta[key])) for key in ("method", "overrides", "from") if key in delta}
    start = methods()[delta["method"]].start if delta.get("method") in methods() else Method.start
    return {k: v for k, v in (params | rest).items() if k not in {f"params.{key}" for key in ("dropout", *start)}}


def _fits(saved: torch.dtype, held: torch.dtype) -> bool:
    """Return whether values of one dtype are exact in another of the same sort."""
    try:
        return saved.is_floating_point == held.is_floating_point and torch.promote_types(saved, held) == held
    except RuntimeError:  # torch has no promotion from float8
        return False
