"""What other tools do to the weights around deltas: offloading that takes them along, shards that they cannot meet."""

from __future__ import annotations

import importlib
from collections.abc import Iterable
from typing import Any

from deltaspec.backbone.offload import is_hooked
from deltaspec.backbone.sharded import holds_shards
from deltaspec.deltas.modules import Deltas
from deltaspec.diagnostics.findings import DeltaSpecError, Diagnostic
from deltaspec.planning.planned import PlannedDelta
from deltaspec.runtime.host import Host


def are_hooked(deltas: Deltas, names: Iterable[str]) -> bool:
    """Return whether accelerate's offloading has taken some of these deltas along with the backbone."""
    return any(delta is not None and is_hooked(delta) for delta in map(deltas.get, names))


def take_out_of_offloading(deltas: Deltas) -> None:
    """Bring the deltas back that accelerate put on the meta device: it loads a module's weights when its forward runs,
    and that of a delta's module never does.
    """
    hooks: Any = importlib.import_module("accelerate.hooks")
    for delta in deltas.held():
        if is_hooked(delta):
            hooks.remove_hook_from_module(delta)
            delta.__dict__.pop("forward", None)
            delta.own()


def refuse_shards(host: Host, deltas: Iterable[PlannedDelta], error: Exception) -> None:
    """Raise DeltaSpecError (DS459) where a forward failed because weights are shards and a delta's tensors are not."""
    if "DTensor" not in str(error):
        return
    findings = []
    for delta in deltas:
        fqns = [part.site.row.fqn for part in delta.sites]
        held = host.deltas.get(delta.name)
        sharded = [f for f in fqns if f in host.modules and holds_shards(host.modules[f])]
        if sharded and held is not None and not holds_shards(held):
            message = f"{sharded[0]} is a shard (of tensor parallelism), and delta {delta.name!r} on it is not"
            hint = "use fully_shard(c), which takes the deltas along, or leave this module out of the parallel plan"
            findings.append(Diagnostic("DS459", message, file="<model>", suggestion=hint))
    if findings:
        raise DeltaSpecError(findings) from error
