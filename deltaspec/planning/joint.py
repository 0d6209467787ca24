"""Plans that grow and shrink: deltas added to those of a plan, and taken out of it."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any

from deltaspec.backbone.observations import Observations
from deltaspec.backbone.table import ModuleTable
from deltaspec.language.beside import load_beside
from deltaspec.language.model import DeltaSpec
from deltaspec.planning.expectations import spec_checks
from deltaspec.planning.plan import Plan
from deltaspec.planning.resolve import resolve


def extended(
    plan: Plan,
    spec: str | os.PathLike[str] | Mapping[str, Any] | DeltaSpec,
    table: ModuleTable,
    observations: Observations,
) -> Plan:
    """Return the plan of all that a plan has and of a spec, as if they had been planned together.

    What was planned stays as it was. Raises DeltaSpecError with all findings.
    """
    loaded, apart = load_beside(spec, plan.specs)
    specs = plan.specs[:apart]
    names = {entry.name for other in specs for entry in other.deltas}
    before = replace(plan, deltas=tuple(d for d in plan.deltas if d.name in names), specs=specs)
    made = resolve((loaded,), table, observations, before)
    known = {delta.name: delta for delta in plan.deltas}
    return replace(made, deltas=tuple(known.get(delta.name, delta) for delta in made.deltas))


def reduced(plan: Plan, names: Collection[str]) -> Plan:
    """Return the plan without some deltas. What their specs expected of all their deltas is left out with them."""
    deltas = tuple(delta for delta in plan.deltas if delta.name not in names)
    specs: list[DeltaSpec] = []
    checks: list[str] = []
    for spec in plan.specs:
        left = tuple(entry for entry in spec.deltas if entry.name not in names)
        if len(left) < len(spec.deltas):
            spec = spec.model_copy(update={"deltas": left, "expect": None})
        if left:
            specs.append(spec)
            own = [plan[entry.name] for entry in left]
            checks += spec_checks(spec, own, plan.table, broken=False)[0]
    shown: dict[str, Any] = {} if deltas else {"notes": (), "proven": True}  # said of sites, of which there is none
    return replace(plan, deltas=deltas, specs=tuple(specs), checks=tuple(checks), **shown)
