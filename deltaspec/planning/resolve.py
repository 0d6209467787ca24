"""spec × model → plan: the place where every error of a user ends, before a tensor is made."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from deltaspec.backbone.observations import Observations
from deltaspec.backbone.reserved import refuse_backbone
from deltaspec.backbone.table import ModuleTable
from deltaspec.backbone.tabulate import tabulate
from deltaspec.diagnostics.findings import DeltaSpecError, Diagnostic, in_order
from deltaspec.diagnostics.wording import counted
from deltaspec.language.load import load
from deltaspec.language.model import DeltaSpec
from deltaspec.methods.declarations import Refusal
from deltaspec.methods.registry import methods
from deltaspec.names.folding import shown
from deltaspec.planning.conflicts import conflicts
from deltaspec.planning.derived import plan_derived, sources_first
from deltaspec.planning.expectations import delta_checks, spec_checks
from deltaspec.planning.plan import Plan
from deltaspec.planning.planned import PlannedDelta
from deltaspec.planning.sites import Placer
from deltaspec.selection.clock import timed
from deltaspec.selection.select import select


def plan(
    model: nn.Module, *specs: str | os.PathLike[str] | Mapping[str, Any] | DeltaSpec, example_inputs: Any = None
) -> Plan:
    """Return what `compile` would do with these specs on this model, without doing it. Meta weights are enough.

    `example_inputs` are what the model's forward takes (a mapping of keywords, a tuple of arguments, or one tensor).
    One forward on meta tensors proves that each site is called; a transformers model brings inputs of its own. The
    model is not changed. Raises DeltaSpecError with all findings of all specs at once.

    >>> print(deltaspec.plan(model, "specs/french.deltaspec.yaml"))
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"a plan needs a torch.nn.Module, not {type(model).__name__}")
    return plan_observed(model, Observations(model, example_inputs), *specs)


def plan_observed(
    model: nn.Module, observations: Observations, *specs: str | os.PathLike[str] | Mapping[str, Any] | DeltaSpec
) -> Plan:
    """Do what `plan` does, where several plans are made of one model: what was observed of it holds for all."""
    loaded = load_all(specs)
    table = tabulate(model)
    refuse_backbone(model)
    return resolve(loaded, table, observations)


def load_all(specs: Sequence[str | os.PathLike[str] | Mapping[str, Any] | DeltaSpec]) -> tuple[DeltaSpec, ...]:
    """Load specs. Raises DeltaSpecError with the findings of all of them, TypeError where there is none."""
    if not specs:
        raise TypeError("no spec given: pass a path, a dict or a DeltaSpec")
    loaded: list[DeltaSpec] = []
    findings: list[Diagnostic] = []
    for spec in specs:
        try:
            loaded.append(load(spec))
        except DeltaSpecError as error:
            findings += error.diagnostics
    if findings:
        raise DeltaSpecError(findings)
    return tuple(loaded)


def resolve(
    specs: Sequence[DeltaSpec], table: ModuleTable, observations: Observations, before: Plan | None = None
) -> Plan:
    """Plan specs on a module table. Raises DeltaSpecError with all findings, in document order.

    What is planned comes after the deltas of the plan `before`, and both are returned as one.
    """
    with timed():
        return _resolve(specs, table, observations, before or Plan((), (), table))


def _resolve(specs: Sequence[DeltaSpec], table: ModuleTable, observations: Observations, before: Plan) -> Plan:
    findings = _repeated_names((*before.specs, *specs))
    deltas: list[PlannedDelta] = []
    checks: list[str] = []
    resolved: list[DeltaSpec] = []
    for spec in specs:
        own_findings, placed = [*_contract(spec, table), *_unused(spec, table)], dict[str, PlannedDelta]()
        for index in sources_first(spec):
            if spec.deltas[index].sources:
                delta, found = plan_derived(spec, index, placed)
                if own_findings:  # sources that are wrong make wrong sums
                    found = []
            else:
                spec, unsettled = _settled(spec, index)
                placer = Placer(spec, index, table, observations, [], [])
                delta, found, spec = placer.place(), placer.findings, placer.spec
                if unsettled:  # sites are refused for params that are not the delta's
                    found = [*unsettled, *(finding for finding in found if finding.code != "DS402")]
                delta = replace(delta, notes=(*delta.notes, *_remarks(delta)))
            if not found:  # counts of a delta that is wrong anyway would only be noise
                met, found = delta_checks(spec, index, delta)
                delta = replace(delta, checks=met)
            entry = spec.deltas[index]
            passes = spec.allowed_passes
            placed[delta.name] = replace(delta, matrix=entry.matrix, train=entry.train, passes=passes)
            own_findings += found
        own = [placed[entry.name] for entry in spec.deltas]
        met, unmet = spec_checks(spec, own, table, bool(own_findings))
        checks += met
        findings += [*own_findings, *unmet]
        deltas += own
        resolved.append(spec)
    findings += conflicts((*before.specs, *specs), (*before.deltas, *deltas))
    if findings:
        raise DeltaSpecError(in_order(findings))
    failed = observations.failure
    unproven = f"not proven that a forward pass reaches every site ({failed}): pass example_inputs"
    notes = tuple(dict.fromkeys((*before.notes, *(() if failed is None else (unproven,)))))
    unused = before.unused | observations.unused(run=False)
    return Plan(
        (*before.deltas, *deltas), (*before.specs, *resolved), table, (*before.checks, *checks), notes,
        before.proven and failed is None, unused, before.passes,
    )  # fmt: skip


def _settled(spec: DeltaSpec, index: int) -> tuple[DeltaSpec, list[Diagnostic]]:
    """Put what a delta's method looks up outside the spec into the plan's copy of it."""
    entry = spec.deltas[index]
    settled = methods()[entry.method].settle(entry.params)
    if isinstance(settled, Refusal):
        message = f"delta {entry.name!r}: {settled.reason}"
        return spec, [spec.diagnostic("DS410", message, ("deltas", index, "params"), settled.suggestion)]
    return (spec if settled is entry.params else spec.with_params(index, settled)), []


def _remarks(delta: PlannedDelta) -> list[str]:
    """Return what the method remarks on its sites, each remark once."""
    said: dict[str, list[str]] = {}
    for site in delta.sites:
        if remark := methods()[delta.method].remark(site.site, site.params):
            said.setdefault(remark, []).append(site.fqn)
    return [f"{remark} ({counted(len(names), 'site')}: {shown(names)})" for remark, names in said.items()]


def _contract(spec: DeltaSpec, table: ModuleTable) -> list[Diagnostic]:
    """Compare the model with the spec's `model`."""
    findings: list[Diagnostic] = []
    if spec.model is None:
        return findings
    if spec.model.type is not None and spec.model.type != table.model_type:
        actual = table.model_type or f"a {table.model_class} without a model_type"
        message = f"this spec is for models of type {spec.model.type!r}, and this one is {actual}"
        findings.append(spec.diagnostic("DS401", message, ("model", "type"), "take another model, or change `model`"))
    known = table.rows[0].bases
    if spec.model.architecture is not None and spec.model.architecture not in known:
        message = f"this spec is for {spec.model.architecture}, and this model is a {table.model_class}"
        hint = "load the model with the class that the spec names, or change `model`"
        findings.append(spec.diagnostic("DS401", message, ("model", "architecture"), hint))
    return findings


def _unused(spec: DeltaSpec, table: ModuleTable) -> list[Diagnostic]:
    """Match the named selectors that nothing refers to, too: what is wrong in them would go unseen."""
    targets = [delta.target for delta in spec.deltas if delta.target is not None]
    matches = [override.match for delta in spec.deltas for override in delta.overrides]
    untouched = spec.expect.untouched if spec.expect is not None else ()
    used = {part.ref for whole in (*targets, *matches, *untouched, *spec.selectors.values()) for part in whole.walk()}
    idle = (selector for name, selector in spec.selectors.items() if name not in used)
    return [finding for selector in idle for finding in select(selector, table, spec.selectors, spec)[1]]


def _repeated_names(specs: Sequence[DeltaSpec]) -> list[Diagnostic]:
    """Several specs share one backbone: their deltas need names of their own."""
    seen: dict[str, str] = {}
    findings = []
    for spec in specs:
        for index, entry in enumerate(spec.deltas):
            if entry.name in seen:
                message = f"the delta name {entry.name!r} is taken by {seen[entry.name]}"
                path = ("deltas", index, "name")
                findings.append(spec.diagnostic("DS407", message, path, "rename one of the two deltas"))
            seen.setdefault(entry.name, spec.name)
    return findings
