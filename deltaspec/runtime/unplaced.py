"""Deltas that have no values: made beside weights on the meta device, which got values since."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import nn

from deltaspec.backbone.offload import brings_weights
from deltaspec.deltas.modules import Deltas
from deltaspec.diagnostics.findings import DeltaSpecError, Diagnostic
from deltaspec.planning.planned import PlannedDelta


def refuse_unplaced(
    deltas: Deltas, names: Iterable[str], planned: Mapping[str, PlannedDelta], modules: Mapping[str, nn.Module]
) -> None:
    """Raise DeltaSpecError (DS534) for deltas on the meta device whose modules have values: torch computes anything of
    that, without an error.
    """
    for name in names:
        delta = deltas.get(name)
        if delta is not None and _is_meta(delta):
            for site in planned[name].sites:
                fqn = site.site.row.fqn
                if _has_values(modules[fqn]) or any(map(brings_weights, modules.values())):
                    raise DeltaSpecError([_unplaced(name, f"{fqn or 'the model'} has")])


def refuse_meta(deltas: Deltas, names: Iterable[str], verb: str) -> None:
    """Raise DeltaSpecError (DS534) for deltas on the meta device, which have nothing to be written or folded."""
    found = [name for name in names if (delta := deltas.get(name)) is not None and _is_meta(delta)]
    if found:
        raise DeltaSpecError([_unplaced(name, f"it cannot be {verb}") for name in found])


def _is_meta(delta: nn.Module) -> bool:
    for parameter in delta._parameters.values():
        return parameter is not None and parameter.is_meta
    return any(buffer is not None and buffer.is_meta for buffer in delta._buffers.values())


def _has_values(module: nn.Module) -> bool:
    return any(not parameter.is_meta for parameter in module.parameters())


def _unplaced(name: str, what: str) -> Diagnostic:
    message = f"the tensors of delta {name!r} are on the meta device and have no values, and {what}"
    hint = "compile the model once its weights are loaded, or load the delta: c.load(dir), load_state_dict(assign=True)"
    return Diagnostic("DS534", message, suggestion=hint)
