"""Tensors and models whose values are spread over processes, by FSDP or tensor parallelism."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from deltaspec.diagnostics.findings import DeltaSpecError, Diagnostic
from deltaspec.diagnostics.wording import counted

_FSDP1, _FSDP2 = "FullyShardedDataParallel", "_get_fsdp_state"


def is_sharded(tensor: Any) -> bool:
    """Return whether a tensor lies in parts over several processes: a DTensor, without loading torch.distributed."""
    return hasattr(tensor, "full_tensor")


def holds_shards(module: nn.Module) -> bool:
    """Return whether a module's own parameters are sharded."""
    return any(map(is_sharded, module._parameters.values()))


def unsharded(tensor: Tensor) -> Tensor:
    """Return a tensor that is sharded over processes (FSDP2, tensor parallelism) whole; others as they are."""
    gather: Any = getattr(tensor, "full_tensor", None)
    return tensor if gather is None else gather()


def in_parts(model: nn.Module) -> None:
    """Let FSDP 2 put back what a forward gathered: until the next one, parameters are what is trained and saved."""
    modules: Iterator[Any] = model.modules()
    for module in modules:
        if hasattr(module, _FSDP2):
            module.reshard()


def sharded_as(target: Tensor, value: Tensor) -> Tensor:
    """Return values for a tensor that may be sharded, in its form; every process has all of them."""
    if not is_sharded(target):
        return value
    from torch.distributed.tensor import DTensor, distribute_tensor

    assert isinstance(target, DTensor)
    return distribute_tensor(value.to(target.device), target.device_mesh, target.placements)


def refuse_sharded(model: nn.Module) -> None:
    """Raise DeltaSpecError (DS459) for a model that is sharded before it is compiled."""
    if found := list(_sharded(model)):
        message = f"{type(model).__name__} is sharded already ({counted(len(found), 'module')}, first {found[0]})"
        hint = "compile the model first, then shard the compiled one: fully_shard(c), or parallelize_module(c.backbone)"
        raise DeltaSpecError([Diagnostic("DS459", message, file="<model>", suggestion=hint)])


def _sharded(model: nn.Module) -> Iterator[str]:
    for fqn, module in model.named_modules():
        marked = type(module).__name__ == _FSDP1 or hasattr(module, _FSDP2)
        if marked or holds_shards(module):
            yield fqn or type(module).__name__
