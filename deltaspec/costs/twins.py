"""Twins: a model's structure without values, which stand for tensors of a device that can be computed with.

The twin of a model is on the meta device, so that deltas are planned and compiled onto it as ever; in a step it holds
fake tensors, which tell the operators apart that a device has of its own, such as its attention.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from deltaspec.backbone.clone import clone
from deltaspec.backbone.offload import unhook
from deltaspec.backbone.unpacking import unpacked
from deltaspec.backbone.weight_forms import dtype_of_values, packed_weight, shape_of_values


def twin(model: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
    """Copy the structure of a model onto the meta device, with plain modules for those that keep codes.

    `dtype`, where it is given, is that of all its numbers.
    """
    plain: dict[int, Any] = {}
    for module in model.modules():
        packed = packed_weight(module)
        if packed is not None:
            values = {"weight": torch.empty(shape_of_values(module, *packed), dtype=_dtype(module), device="meta")}
            if (bias := module._parameters.get("bias")) is not None:
                values["bias"] = torch.empty_like(bias, device="meta")
            plain[id(module)] = unpacked(module, values)
    made = clone(model, device="meta", replace=plain)
    unhook(made)
    return made if dtype is None else made.to(dtype)


def _dtype(module: nn.Module) -> torch.dtype:
    return dtype_of_values(module) or torch.float32


def checkpoint(model: nn.Module) -> bool:
    """Let what is of transformers in a model compute its layers again in the backward; return whether there is any."""
    for module in model.modules():
        if getattr(module, "supports_gradient_checkpointing", False):
            enable: Any = getattr(module, "activation_checkpointing_enable", None)
            if enable is not None:
                enable()
                return True
    return False


def put_fakes(model: nn.Module, device: str) -> None:
    """Give a twin fake tensors of a device in the place of its own; ties stay. Called inside of a FakeTensorMode."""
    made: dict[int, Tensor] = {}
    for module in model.modules():
        places: tuple[dict[str, Any], ...] = (module._parameters, module._buffers, module.__dict__)
        for place in places:
            for name, tensor in place.items():
                if isinstance(tensor, Tensor):
                    if id(tensor) not in made:
                        made[id(tensor)] = _fake(tensor, device)
                    place[name] = made[id(tensor)]


def _fake(tensor: Tensor, device: str) -> Tensor:
    fake = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=device)
    return nn.Parameter(fake, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else fake
