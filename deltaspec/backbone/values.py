"""The values of a tensor as it lies: sharded over processes, quantised, offloaded. Read, never written."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from deltaspec.backbone.offload import value_of
from deltaspec.backbone.weight_forms import dequantised, packed_form


@dataclass(frozen=True, slots=True)
class Values:
    """The values of a tensor in one plain tensor, and how exactly they are known."""

    plain: Tensor | None
    """None where there are none: on the meta device, or packed in a form that cannot be read."""
    bits: int | None = None
    """Bits of each value, where they are quantised; None where they are floats."""


def values_of(tensor: Tensor, module: nn.Module | None = None, name: str = "") -> Values:
    """Return a tensor's values; `module` and `name` say where it stands, so that offloaded ones are found.

    Every process that holds a part of a sharded tensor must ask at the same time.
    """
    tensor = tensor.detach()
    if module is not None:
        tensor = value_of(module, name, tensor)
    if tensor.is_meta:
        return Values(None)
    tensor = unsharded(tensor)
    bits = quantised_bits(tensor)
    if bits is not None:
        return Values(dequantised(tensor, module), bits)
    if not (tensor.is_floating_point() or tensor.is_complex()):
        return Values(None, 8)  # codes whose meaning is elsewhere
    return Values(tensor)


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


def quantised_bits(tensor: Tensor) -> int | None:
    """Return how many bits each value has in a quantised tensor (torchao, quanto, bitsandbytes); None for others."""
    form = packed_form(tensor)
    if form is None or not form.readable:
        return None
    kind, span = type(tensor).__name__.lower(), getattr(tensor, "quant_max", None)
    narrow = isinstance(span, int | float) and span <= 15
    return 4 if narrow or any(word in kind for word in ("4bit", "int4", "qbits")) else 8
