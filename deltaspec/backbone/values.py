"""The values of a tensor as it lies: sharded over processes, quantised, offloaded. Read, never written."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from deltaspec.backbone.offload import value_of
from deltaspec.backbone.table import Packed
from deltaspec.backbone.weight_forms import packed_weight
from deltaspec.backbone.weight_forms import values_of as unpacked


@dataclass(frozen=True, slots=True)
class Values:
    """The values of a tensor in one plain tensor, and how exactly they are known."""

    plain: Tensor | None
    """None where there are none: on the meta device, or packed in a form that cannot be read."""
    bits: int | None = None
    """Bits of each value, where they are quantised; None where they are floats."""


def values_of(module: nn.Module, name: str, tensor: Tensor) -> Values:
    """Return the values of a module's own tensor, which stands there under a name.

    Every process that holds a part of a sharded tensor must ask at the same time.
    """
    packed = packed_weight(module) if name == "weight" else None
    if packed is not None:
        form, codes = packed
        if not form.readable and codes.is_floating_point() and not codes.is_meta:  # float8 agrees with itself
            return Values(codes.detach())
        if codes.is_meta:
            return Values(None, _bits(form))
        return Values(unpacked(module).detach() if form.readable else None, _bits(form))
    tensor = value_of(module, name, tensor.detach())
    return Values(None if tensor.is_meta else unsharded(tensor))


def unsharded(tensor: Tensor) -> Tensor:
    """Return a tensor that is sharded over processes (FSDP2, tensor parallelism) whole; others as they are."""
    gather: Any = getattr(tensor, "full_tensor", None)
    return tensor if gather is None else gather()


def is_sharded(tensor: Tensor) -> bool:
    """Return whether a tensor lies in parts over several processes."""
    return hasattr(tensor, "full_tensor")


def sharded_as(target: Tensor, value: Tensor) -> Tensor:
    """Return values for a tensor that may be sharded, in its form; every process has all of them."""
    if not is_sharded(target):
        return value
    from torch.distributed.tensor import DTensor, distribute_tensor

    assert isinstance(target, DTensor)
    return distribute_tensor(value.to(target.device), target.device_mesh, target.placements)


def _bits(form: Packed) -> int:
    """Return how many bits a code has, about: 8 where its name says so, else as few as are common."""
    return 8 if "8" in form.name.replace("uint8", "") or "QBytes" in form.name else 4
