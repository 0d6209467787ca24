"""Derived deltas in the plan: the order in which they are computed, what they become, and what cannot be combined."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from math import prod
from typing import Any

import torch

from deltaspec.diagnostics.findings import Diagnostic
from deltaspec.language.derivation import METHOD, Derivation, DerivedParams, in_order
from deltaspec.language.model import DeltaSpec
from deltaspec.methods.base import Method
from deltaspec.methods.declarations import DeltaTensors, Init, MethodParams, Site, TensorSpec
from deltaspec.methods.registry import methods
from deltaspec.methods.shared.weights import weight_shape
from deltaspec.planning.planned import PlannedDelta, PlannedSite


def why_not(derivation: Derivation, method: str, parts: Sequence[PlannedSite]) -> tuple[str, str] | None:
    """Return why sources cannot be combined at a site, and the way out; None where they can."""
    site, combine = parts[0].site, derivation.combine
    if site.parameter is not None:
        return "a single parameter has no derived form", "leave it out of the sources' targets"
    if site.row.conv_groups > 1:
        return f"a grouped convolution ({site.row.type}) has no derived form", "leave it out of the sources' targets"
    if reason := next(filter(None, (methods()[method].unmergeable(site, part.params) for part in parts)), None):
        return f"a derived delta is a change of the weight, and {reason}", "leave it out of the sources' targets"
    if refusal := methods()[METHOD].refuse(site, lora(1)):
        return f"a derived delta is a low-rank update, and {refusal.reason}", "leave it out of the sources' targets"
    if others := {name for part in parts for name in changed_parameters(methods()[method], part)} - {"weight"}:
        return f"a source changes the {', '.join(sorted(others))}, too", "combine deltas that change the weight alone"
    if combine == "svd":
        return None
    if not all(has_plain_factors(part.params) for part in parts):
        reason = f"{combine} takes plain factors, without use_dora, parts and init: orthogonal or pissa"
        return reason, "use combine: svd"
    ranks = dict.fromkeys(methods()[method].rank(part.params) for part in parts)
    if combine != "cat" and len(ranks) > 1:
        return f"{combine} needs sources of one rank, not {', '.join(map(str, ranks))}", "use combine: cat, or svd"
    return None


def has_plain_factors(params: Any) -> bool:
    """Return whether these parameters of lora give two factors whose product is all that it adds."""
    return not (params.use_dora or params.keeps_start or params.parts)


def changed_parameters(method: Method, planned: PlannedSite) -> Iterable[str]:
    """Return the own names of the parameters that a delta changes at a site."""
    dtypes = [getattr(torch, spec.dtype or "float32") for spec in planned.tensors]
    own = [torch.empty(t.shape, device="meta", dtype=d) for t, d in zip(planned.tensors, dtypes, strict=True)]
    tensors = DeltaTensors(tuple(spec.name for spec in planned.tensors), own)
    weights = {p.name: torch.empty(p.shape, device="meta") for p in planned.site.row.parameters}
    return method.fold(planned.site, planned.params, tensors, weights)


def sources_first(spec: DeltaSpec) -> list[int]:
    """Return the indices of a spec's deltas, each one after its sources."""
    index = {entry.name: number for number, entry in enumerate(spec.deltas)}
    return [index[name] for name in in_order({entry.name: entry.sources for entry in spec.deltas})]


def plan_derived(
    spec: DeltaSpec, index: int, planned: Mapping[str, PlannedDelta]
) -> tuple[PlannedDelta, list[Diagnostic]]:
    """Plan a derived delta from its planned sources; return the findings, too."""
    entry = spec.deltas[index]
    assert entry.combine is not None and isinstance(entry.params, DerivedParams)
    derivation = Derivation(entry.combine, tuple(entry.sources.items()), entry.params)
    sources = [planned[name] for name in entry.sources]
    own = [{site.fqn: site for site in source.sites} for source in sources]
    problems: dict[tuple[str, str], str] = {}
    for source, sites in zip(sources[1:], own[1:], strict=True):
        if lacking := sorted(own[0].keys() ^ sites.keys()):
            has = sources[0].name if lacking[0] in own[0] else source.name
            reason = f"{sources[0].name} and {source.name} have different sites; only {has} has"
            problems.setdefault((reason, "give the sources one target"), lacking[0])
    made: dict[int, MethodParams] = {}
    placed = []
    for fqn in own[0] if not problems else ():
        parts = [sites[fqn] for sites in own]
        if problem := why_not(derivation, sources[0].method, parts):
            problems.setdefault(problem, fqn)
            continue
        rank = rank_of(derivation, sources[0].method, parts)
        params = made.setdefault(rank, lora(rank))
        placed.append(PlannedSite(parts[0].site, params, _tensors(parts[0].site, params)))
    line, _ = spec.locate(("deltas", index))
    both = ", ".join(source.name for source in sources if source.attached and entry.attached)
    delta = PlannedDelta(
        name=entry.name,
        method=METHOD,
        attached=entry.attached,
        params=placed[0].params if placed else lora(1),
        sites=tuple(placed),
        seed=spec.seed,
        spec=spec.name,
        location=f"{spec.name}:{line}" if line else spec.name,
        notes=(f"starts attached beside {both}, which it is built from: they add up",) if both else (),
        derived=derivation,
    )
    findings = [
        spec.diagnostic("DS409", f"delta {entry.name!r}: {reason} ({fqn})", ("deltas", index, "from"), hint)
        for (reason, hint), fqn in problems.items()
    ]
    return delta, findings


def lora(rank: int) -> MethodParams:
    """Return the parameters of a derived delta's sites: lora's, for a scale of 1."""
    return methods()[METHOD].Params.model_validate({"rank": rank, "alpha": float(rank)})


def _tensors(site: Site, params: MethodParams) -> tuple[TensorSpec, ...]:
    """Declare lora's tensors, as buffers that are filled later."""
    return tuple(replace(spec, init=Init(), buffer=True) for spec in methods()[METHOD].tensors(site, params))


def rank_of(derivation: Derivation, method: str, parts: Sequence[PlannedSite]) -> int:
    """Return the rank of the result at a site, from the sources there: no more than the weight has for `svd`."""
    ranks = [methods()[method].rank(part.params) for part in parts]
    if derivation.combine == "cat":
        return sum(ranks)
    if derivation.combine != "svd":
        return ranks[0]
    out_width, *inner = weight_shape(parts[0].site)
    return min(derivation.params.rank or max(ranks), out_width, prod(inner))
