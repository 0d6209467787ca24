"""Several processes that train one model: what they count together, so that each does what one process would."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import distributed, nn
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel

from deltaspec.backbone.sharded import is_sharded
from deltaspec.compiler.compiled import CompiledModel
from deltaspec.diagnostics.findings import DeltaSpecError, Diagnostic


def are_several(model: nn.Module) -> bool:
    """Return whether several processes train this model together: under DDP, or in shards."""
    if not (distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1):
        return False
    return isinstance(model, DistributedDataParallel) or any(map(is_sharded, model.parameters()))


def unwrapped(model: nn.Module) -> CompiledModel:
    """Return the compiled model that this is, or that DistributedDataParallel wraps. Raise TypeError."""
    found = model.module if isinstance(model, DistributedDataParallel) else model
    if not isinstance(found, CompiledModel):
        kind = type(model).__name__
        raise TypeError(f"what trains is deltaspec.compile(…), or that in DistributedDataParallel, not a {kind}")
    return found


def require_any_delta(model: nn.Module) -> None:
    """Let each process leave out deltas that others use. Raise DeltaSpecError (DS382) where it was told not to."""
    if isinstance(model, DistributedDataParallel) and (not model.find_unused_parameters or model.static_graph):
        message = "jobs end one by one, and DistributedDataParallel was told that each step uses all parameters"
        hint = "give it find_unused_parameters=True (Trainer: ddp_find_unused_parameters), and no static_graph"
        raise DeltaSpecError([Diagnostic("DS382", message, "<jobs>", suggestion=hint)])
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_reduce_scatter_unused_params(True, recurse=False)


def summed(values: Sequence[Sequence[float]], device: torch.device) -> list[list[float]]:
    """Return the sums of these numbers over all processes."""
    found = torch.tensor(values, dtype=torch.float64, device=device)
    distributed.all_reduce(found)
    sums: list[list[float]] = found.tolist()
    return sums


def gathered(value: Any) -> list[Any]:
    """Return what each process has, in the order of the processes."""
    found: list[Any] = [None] * distributed.get_world_size()
    distributed.all_gather_object(found, value)
    return found
