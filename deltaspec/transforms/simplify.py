"""After training: deltas that compute the same without what only training needed, such as a prompt's encoder."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any

import torch

from deltaspec.deltas.modules import Delta, storage_key
from deltaspec.language.load import load
from deltaspec.language.model import DeltaEntry, DeltaSpec
from deltaspec.methods.declarations import DeltaTensors
from deltaspec.methods.registry import methods
from deltaspec.planning.plan import Plan
from deltaspec.planning.planned import PlannedDelta, PlannedSite


def simplify(plan: Plan, names: Collection[str]) -> Plan:
    """Return the plan with these deltas in their simpler form; those that have none stay, and so does the rest."""
    entries = [entry for spec in plan.specs for entry in spec.deltas if entry.name in names]
    chosen = {entry.name for entry in entries if any(_has_simpler(entry.method, params) for params in _params(entry))}
    specs = tuple(_spec(spec, chosen) if chosen & {e.name for e in spec.deltas} else spec for spec in plan.specs)
    new = {entry.name: entry for spec in specs for entry in spec.deltas}
    deltas = tuple(_delta(delta, new[delta.name]) if delta.name in chosen else delta for delta in plan.deltas)
    return replace(plan, deltas=deltas, specs=specs)


@torch.no_grad()
def copy_tensors(old: Plan, new: Plan, deltas: Mapping[str, Delta], into: Mapping[str, Delta]) -> None:
    """Fill the deltas of a simplified plan from those of the plan that it was made of."""
    for before, after in zip(old.deltas, new.deltas, strict=True):
        source, target = deltas[before.name], into[after.name]
        if before is after:
            for key, value in source.tensors():
                target.tensor(key).copy_(value)
            continue
        for planned, place in zip(before.sites, after.sites, strict=True):
            names = tuple(spec.name for spec in planned.tensors)
            fqn = planned.site.row.fqn
            own = DeltaTensors(names, [source.tensor(storage_key(fqn, spec)) for spec in planned.tensors])
            if _has_simpler(before.method, planned.params):
                values = methods()[before.method].simplified(planned.site, planned.params, own)
            else:
                values = {name: getattr(own, name) for name in names}
            for spec in place.tensors:
                target.tensor(storage_key(place.site.row.fqn, spec)).copy_(values[spec.name])


def _params(entry: DeltaEntry) -> list[Any]:
    return [entry.params, *(entry.params_with(override) for override in entry.overrides)]


def _has_simpler(method: str, params: Any) -> bool:
    return methods()[method].simpler(params) is not None


def _form(method: str, params: Any) -> tuple[str, dict[str, Any]]:
    return methods()[method].simpler(params) or (method, params.model_dump(mode="json", exclude_none=True))


def _spec(spec: DeltaSpec, chosen: Collection[str]) -> DeltaSpec:
    """Write a spec with these deltas in their simpler form. What it expects was said of the other form."""
    data = spec.to_data()
    data.pop("expect", None)
    for entry, written in zip(spec.deltas, data["deltas"], strict=True):
        if entry.name in chosen:
            written.pop("expect", None)
            written["method"], written["params"] = _form(entry.method, entry.params)
            for override, place in zip(entry.overrides, written.get("overrides", ()), strict=True):
                place["params"] = _form(entry.method, entry.params_with(override))[1]
    return load(data)


def _delta(delta: PlannedDelta, entry: DeltaEntry) -> PlannedDelta:
    method = methods()[entry.method]
    sites = []
    for planned in delta.sites:
        params = entry.params
        if planned.override is not None:
            params = entry.params_with(entry.overrides[planned.override])
        sites.append(PlannedSite(planned.site, params, method.tensors(planned.site, params), planned.override))
    return replace(delta, method=entry.method, params=entry.params, sites=tuple(sites), checks=())
