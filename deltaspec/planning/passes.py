"""What passes over training steps take of a plan: the sites and activations that they change, by pass."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from typing import TYPE_CHECKING, Any

from deltaspec.diagnostics.wording import counted
from deltaspec.language.passes import PASSES
from deltaspec.methods.declarations import Form
from deltaspec.methods.registry import methods
from deltaspec.names.folding import fold

if TYPE_CHECKING:
    from deltaspec.planning.planned import PlannedDelta, PlannedDeltas, PlannedSite

_ACTIVATION = re.compile(r"(?i).*(gelu|silu|swish|mish|activation|relu6|leakyrelu|elu)")
_NOUNS = {"recompute": "site", "rematerialise": "input", "dropout": "dropout", "feed_forward": "activation"}
_AT_MOST = {"rematerialise": "up to "}


def regions_of(plan: PlannedDeltas) -> dict[str, tuple[str, ...]]:
    """Return the FQNs that each pass takes, by its name; passes that take none are left out.

    `recompute` and `rematerialise` are told by sites, `feed_forward` by the activations beside those. Of inputs, those
    are made again that a step shows to come from what the backbone keeps.
    """
    found: dict[str, dict[str, None]] = {name: {} for name in PASSES}
    for delta in plan.deltas:
        wanted = delta.passes & plan.passes
        if "recompute" not in wanted:
            continue
        sites = list(_sites(delta))
        names = dict.fromkeys(site.fqn for site in sites)
        found["recompute"] |= names
        found["rematerialise"] |= names if "rematerialise" in wanted else {}
        found["dropout"] |= _dropouts(plan) if names and "dropout" in wanted else {}
        linear = {s.site.row.fqn.rpartition(".")[0] for s in sites if s.site.kind in ("linear", "conv1d")}
        found["feed_forward"] |= dict.fromkeys(_beside(plan, linear)) if "feed_forward" in wanted else {}
    return {name: tuple(names) for name, names in found.items() if names}


def in_words(plan: PlannedDeltas) -> str | None:
    """Say what the passes take; None where they take nothing."""
    regions = regions_of(plan).items()
    parts = [f"{name} {_AT_MOST.get(name, '')}{counted(len(names), _NOUNS[name])}" for name, names in regions]
    return f"Passes in training: {', '.join(parts)}" if parts else None


def as_data(plan: PlannedDeltas) -> dict[str, Any]:
    """Return the same as JSON data, names folded over layers."""
    return {name: {"at": fold(names), "count": len(names)} for name, names in regions_of(plan).items()}


def _sites(delta: PlannedDelta) -> Iterator[PlannedSite]:
    method = methods()[delta.method]
    known: dict[Any, bool] = {}
    for planned in delta.sites:
        site = planned.site
        if method.folds(site, planned.params) or method.attends or site.parameter is not None:
            continue
        key = (site.kind, planned.params, site.row.parts, tuple(tensor.name for tensor in planned.tensors))
        if key not in known:
            known[key] = _multiplies(delta.method, planned)
        if known[key]:
            yield planned


def _multiplies(method: str, planned: PlannedSite) -> bool:
    """Return whether a formula has products with tensors of its own, which keep what is multiplied."""
    from torch.nn import functional as F

    from deltaspec.graphs.formula import formula
    from deltaspec.graphs.links import Link

    row = planned.site.row
    dims = len(row.shape_of("weight")) if row.has_parameter("weight") else 0
    names = tuple(tensor.name for tensor in planned.tensors)
    form = Form(row.kind, dims, dims - 2 if row.kind == "conv" else 0, row.conv_groups, names, row.parts)
    traced = formula(Link(method, planned.params, form), row.kind == "other" or not row.faithful)
    return any(node.target is F.linear for node in traced.own)


def _dropouts(plan: PlannedDeltas) -> dict[str, None]:
    return dict.fromkeys(row.fqn for row in plan.table.rows if row.type == "Dropout")


def _beside(plan: PlannedDeltas, owners: Collection[str]) -> Iterator[str]:
    for row in plan.table.rows:
        alone = row.fqn and not row.children and not row.parameters
        if alone and row.fqn.rpartition(".")[0] in owners and _ACTIVATION.fullmatch(row.type):
            yield row.fqn
