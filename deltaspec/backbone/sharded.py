"""Models whose weights are shards, spread over processes by FSDP or tensor parallelism."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

from deltaspec.diagnostics.findings import DeltaSpecError, Diagnostic
from deltaspec.diagnostics.wording import counted

_FSDP1, _FSDP2 = "FullyShardedDataParallel", "_get_fsdp_state"


def is_shard(tensor: Any) -> bool:
    """Return whether a tensor is a DTensor, known without loading torch.distributed."""
    return hasattr(tensor, "device_mesh") and hasattr(tensor, "placements")


def refuse_sharded(model: nn.Module) -> None:
    """Raise DeltaSpecError (DS459) for a model that is sharded before it is compiled."""
    if found := list(_sharded(model)):
        message = f"{type(model).__name__} is sharded already ({counted(len(found), 'module')}, first {found[0]})"
        hint = "compile the model first, then shard the compiled one: fully_shard(c), or parallelize_module(c.backbone)"
        raise DeltaSpecError([Diagnostic("DS459", message, file="<model>", suggestion=hint)])


def _sharded(model: nn.Module) -> Iterator[str]:
    for fqn, module in model.named_modules():
        marked = type(module).__name__ == _FSDP1 or hasattr(module, _FSDP2)
        if marked or any(map(is_shard, module._parameters.values())):
            yield fqn or type(module).__name__
