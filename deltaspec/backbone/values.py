"""The values of a tensor as it lies: sharded over processes, quantised, offloaded. Read, never written."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

from deltaspec.backbone.offload import value_of


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
        return Values(_dequantised(tensor), bits)
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
    kind = type(tensor).__name__.lower()
    if getattr(tensor, "quant_state", None) is not None or "4bit" in kind or "int4" in kind:
        return 4
    if getattr(tensor, "SCB", None) is not None or "int8params" in kind:
        return 8
    if "dequantize" not in vars(type(tensor)) or type(tensor) in (Tensor, nn.Parameter):
        return None
    span = getattr(tensor, "quant_max", None)
    return 4 if isinstance(span, int | float) and span <= 15 else 8


def _dequantised(tensor: Any) -> Tensor | None:
    if (state := getattr(tensor, "quant_state", None)) is not None:
        unpack: Any = import_module("bitsandbytes.functional")  # it made the tensor, so it is there
        found: Tensor = unpack.dequantize_4bit(tensor.data, state)
        return found
    if (scales := getattr(tensor, "SCB", None)) is not None:
        codes: Tensor = tensor.data
        wide: Tensor = scales
        return codes.to(torch.float32) * wide.to(torch.float32)[:, None] / 127
    if "dequantize" in vars(type(tensor)):
        plain: Tensor = tensor.dequantize()
        return plain
    return None
