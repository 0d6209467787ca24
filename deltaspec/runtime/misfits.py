"""Modules that are no longer what deltas were planned for: replaced, resized or converted since."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from torch import nn

from deltaspec.backbone.table import Row
from deltaspec.backbone.weight_forms import own_shape
from deltaspec.diagnostics.findings import DeltaSpecError, Diagnostic
from deltaspec.methods.declarations import Site
from deltaspec.methods.registry import methods
from deltaspec.planning.planned import PlannedDelta
from deltaspec.runtime.host import Host


def refuse_misfits(host: Host, deltas: Iterable[PlannedDelta], *, merged: bool = False) -> None:
    """Raise DeltaSpecError (DS458) for deltas whose modules are gone, or have another class or other shapes.

    `merged`: they are about to be folded into the weights, as some methods do in each forward, and so these have to be
    the modules' own.
    """
    sites = {(delta.name, part.fqn): (delta.method, part) for delta in deltas for part in delta.sites}
    findings = []
    for (name, _), (kind, part) in sites.items():
        site, method = part.site, methods()[kind]
        row, fqn = _as_held(site), site.row.fqn
        module = host.modules.get(fqn)
        what = _misfit(row, module, site.stack is None)
        changes = merged or method.folds(site, part.params) or method.substitutes(site, part.params)
        if what is None and module is not None and changes:
            what = _computed(row, module)
        if what is not None:
            message = f"delta {name!r} was compiled for {fqn or 'the model'} as {_described(row)}, and it {what}"
            hint = "change the model before deltaspec.compile, or compile the changed model and load the saved deltas"
            findings.append(Diagnostic("DS458", message, file="<model>", suggestion=hint))
    if findings:
        raise DeltaSpecError(findings)


def _as_held(site: Site) -> Row:
    """Return a site's module with the parameters that it holds; as a site, a single one is seen as a layer's weight."""
    if site.stack is None or site.parameter is None:
        return site.row
    [matrix] = site.row.parameters
    return replace(site.row, parameters=(replace(matrix, name=site.parameter, shape=(*site.stack, *matrix.shape)),))


def _misfit(row: Row, module: nn.Module | None, whole: bool) -> str | None:
    if module is None:
        return "is gone"
    planned: Any = next((kind for kind in type(module).__mro__ if kind.__name__ == row.type), None)
    if planned is None:
        return f"is a {type(module).__name__} now"
    if row.kind != "other" and type(module).forward is not planned.forward:
        return f"is a {type(module).__name__} now, with a forward of its own"
    for parameter in row.parameters:
        found = own_shape(module, parameter.name)
        if found is None:
            return f"has no {parameter.name} any more"
        # A shard has other dimensions; it still is the same weight.
        if len(parameter.shape) > 1 and len(found) == len(parameter.shape) and found != parameter.shape:
            return f"has {parameter.name} {[*found]} now"
    if not whole:
        return None
    known = {parameter.name for parameter in row.parameters}
    surplus = [name for name in ("weight", "bias") if name not in known and _is_parameter(module, name)]
    return f"has a {surplus[0]} now" if surplus else None


def _computed(row: Row, module: nn.Module) -> str | None:
    """Say which parameter another tool computes since (a parametrization, weight_norm, pruning)."""
    if row.computed or row.parametrised:
        return None  # as it was planned
    names = [p.name for p in row.parameters if p.packed is None and not _is_parameter(module, p.name)]
    return f"has a {names[0]} now that is computed from other tensors" if names else None


def _is_parameter(module: nn.Module, name: str) -> bool:
    return module._parameters.get(name) is not None


def _described(row: Row) -> str:
    shapes = ", ".join(f"{parameter.name} {[*parameter.shape]}" for parameter in row.parameters)
    return f"a {row.type} with {shapes}" if shapes else f"a {row.type}"
