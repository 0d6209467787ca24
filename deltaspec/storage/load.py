"""Reading saved deltas into a compiled model: every key accounted for, all or nothing."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from deltaspec.backbone.sharded import sharded_as
from deltaspec.deltas.finite import is_finite, not_finite
from deltaspec.deltas.modules import Deltas
from deltaspec.diagnostics.findings import DeltaSpecError, Diagnostic, require_known
from deltaspec.diagnostics.progress import tracked
from deltaspec.methods.base import Method
from deltaspec.methods.registry import methods
from deltaspec.names.folding import shown
from deltaspec.names.prefixes import Prefix
from deltaspec.planning.plan import Plan
from deltaspec.planning.planned import PlannedDelta
from deltaspec.runtime.active import Active
from deltaspec.storage.delta_set import DeltaSet
from deltaspec.storage.matching import Match, Matcher, Outcome, present_of
from deltaspec.storage.saved import without_values

_Read = TypeVar("_Read")


def load(
    active: Active,
    plan: Plan,
    deltas: Deltas,
    opened: Callable[[], DeltaSet],
    names: tuple[str, ...] = (),
    match: Match = "weights",
) -> Plan:
    """Read the tensors of a set, by default all, into the deltas of the same names. All or nothing.

    Return the plan with what there is to say of them: under which prefix they were found, what `match` let pass.

    Raises DeltaSpecError (DS521-DS529, DS534, DS537) with all findings, the model unchanged: files missing or damaged,
    another backbone, a delta that the model lacks or has with another method or other params, tensors missing, surplus,
    of another shape, of a dtype that would lose digits, or not finite; a model on the meta device.
    """

    def read(saved: DeltaSet) -> Plan:
        require_known(names, saved.names, saved.folder)
        chosen, findings = names or tuple(saved.names), list[Diagnostic]()
        outcomes = Matcher(present_of(active, plan), match).outcomes(saved, chosen, findings)
        for name in chosen:
            if name in known:
                own = saved.planned(name)
                other = (
                    _other_meaning(saved, name, plan) if own is None else _other_params(saved, name, own, plan[name])
                )
                findings += other
        fill(active, plan, deltas, saved, outcomes, chosen, findings)
        return remarked(plan, outcomes)

    known = [delta.name for delta in plan.deltas]
    return settled(opened, read)


def remarked(plan: Plan, outcomes: Mapping[str, Outcome]) -> Plan:
    """Return the plan with what there is to say of deltas that were read."""
    notes = {name: outcome.notes for name, outcome in outcomes.items()}
    return plan.with_remarks(notes, {name: outcome.let_pass for name, outcome in outcomes.items()})


def settled(opened: Callable[[], DeltaSet], read: Callable[[DeltaSet], _Read]) -> _Read:
    """Read a set: the old one or the new one, where it is saved again meanwhile and the old one's files go."""
    while True:
        saved = opened()
        try:
            return read(saved)
        except DeltaSpecError:
            if not saved.replaced():
                raise


def fill(
    active: Active,
    plan: Plan,
    deltas: Deltas,
    saved: DeltaSet,
    outcomes: Mapping[str, Outcome],
    names: Sequence[str],
    findings: list[Diagnostic],
) -> None:
    """Read the tensors of a set into the deltas of the same names. All or nothing, as `load`.

    `findings` are those that there are before; what came of the backbone is in `outcomes`.
    """
    staged: list[tuple[Tensor, Tensor]] = []
    own = [delta.name for delta in plan.deltas]  # those of libraries are no place for other tensors
    for name in tracked(names, "reading deltas", len(names)):
        findings += saved.read(name, "lock")[1]
        if name not in own:
            hint = f"it has: {', '.join(own)}; {saved.way_in(name)}"
            findings.append(saved.finding("DS524", f"the model has no delta {name!r}", hint))
            continue
        if name not in outcomes:  # it has no place on this backbone, of which there is a finding
            findings += saved.read(name, "file")[1]
            continue
        tensors = dict(deltas[name].tensors())
        if any(value.is_meta for value in tensors.values()):
            findings.append(without_values(name, "loaded"))
        staged += match(saved, name, tensors, findings, outcomes[name].prefix)
    if findings:
        raise DeltaSpecError(dict.fromkeys(findings))
    with torch.no_grad():
        for target, value in staged:
            target.copy_(sharded_as(target, value))
    active.derived.refresh([delta.name for delta in plan.deltas])


def match(
    saved: DeltaSet,
    name: str,
    targets: dict[str, Tensor],
    findings: list[Diagnostic],
    prefix: Prefix = Prefix(),  # noqa: B008  (frozen)
) -> list[tuple[Tensor, Tensor]]:
    """Account for every key of one delta: (target, value) pairs, and a finding for each that does not fit.

    `prefix` is what the saved names read here. Where a file is damaged behind its list of tensors, that is compared.
    """
    values = saved.tensors(name, findings)
    keys = missing_and_surplus(saved, name, targets, findings, prefix)
    file = saved.entry[name]["file"]

    def found(code: str, message: str, suggestion: str) -> None:
        findings.append(saved.finding(code, message, suggestion, file))

    staged = []
    for key in sorted(key for key, old in keys.items() if values and old in values):
        value, target = (values or {})[keys[key]], targets[key]
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


def missing_and_surplus(
    saved: DeltaSet, name: str, targets: Iterable[str], findings: list[Diagnostic], prefix: Prefix
) -> dict[str, str]:
    """List the tensors that a file lacks or has too many, also where it is damaged behind its own list of them.

    Return the names that they have there, as `saved_keys`; none where the file has no such list.
    """
    there = saved.keys(name)
    if there is None:
        return {}
    keys, file = saved_keys(targets, there, prefix), saved.entry[name]["file"]
    for key in sorted(key for key, old in keys.items() if old not in there):
        hint = "the delta has sites that were not saved: compare the specs"
        findings.append(saved.finding("DS525", f"{name}: tensor {key} is missing", hint, file))
    for key in sorted(there - set(keys.values())):
        hint = "the model's delta lacks this site: compare the specs"
        findings.append(saved.finding("DS525", f"{name}: tensor {key} fits nowhere", hint, file))
    return keys


def saved_keys(here: Iterable[str], there: Collection[str], prefix: Prefix) -> dict[str, str]:
    """Return the names that a delta's tensors have in a file, by those that they have here.

    What sites share is not named after a module, and has the same name everywhere.
    """
    moved = {key: prefix.to_saved(key) for key in here}
    return {key: name if name is not None and name in there else key for key, name in moved.items()}


def _other_meaning(saved: DeltaSet, name: str, plan: Plan) -> list[Diagnostic]:
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


def _other_params(saved: DeltaSet, name: str, own: PlannedDelta, theirs: PlannedDelta) -> list[Diagnostic]:
    """Compare what a delta is here with what a model has under its name, site by site."""
    hint = "compile the converted spec (deltaspec convert), or deltaspec.restore(model, dir)"
    if own.method != theirs.method:
        return [saved.finding("DS529", f"{name}: this is {own.method}, and the model's is {theirs.method}", hint)]
    passing = methods()[own.method].passing
    known = {site.fqn: site.params.model_dump() for site in theirs.sites}
    differs: dict[tuple[str, str, str], list[str]] = {}
    for site in own.sites:
        for key, value in site.params.model_dump().items() if site.fqn in known else ():
            if key not in passing and value != (there := known[site.fqn].get(key)):
                differs.setdefault((key, str(value), str(there)), []).append(site.fqn)
    return [
        saved.finding("DS529", f"{name}: params.{key} is {value} at {shown(at)}, and {there} in the model", hint)
        for (key, value, there), at in differs.items()
    ]


def _meaning(spec: dict[str, Any], name: str) -> dict[str, Any]:
    """Return what trained tensors depend on: the method and its params, but for those of training and the start."""
    delta = next(delta for delta in spec["deltas"] if delta["name"] == name)
    params = {f"params.{key}": json.loads(json.dumps(value)) for key, value in delta.get("params", {}).items()}
    rest = {key: json.loads(json.dumps(delta[key])) for key in ("method", "overrides", "from") if key in delta}
    method = methods().get(delta.get("method", ""))
    passing = Method.start | Method.training if method is None else method.passing
    return {k: v for k, v in (params | rest).items() if k not in {f"params.{key}" for key in passing}}


def _fits(saved: torch.dtype, held: torch.dtype) -> bool:
    """Return whether values of one dtype are exact in another of the same sort."""
    try:
        return saved.is_floating_point == held.is_floating_point and torch.promote_types(saved, held) == held
    except RuntimeError:  # torch has no promotion from float8
        return False
