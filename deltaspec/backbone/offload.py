"""Weights that are elsewhere: accelerate keeps them on meta tensors, and a hook brings them for each forward."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

_HOOK = "_hf_hook"


def hooks_of(module: nn.Module) -> Iterator[Any]:
    """Yield accelerate's hooks of a module, the chained ones one by one."""
    hook = module.__dict__.get(_HOOK)
    if hook is not None:
        yield from getattr(hook, "hooks", (hook,))


def is_hooked(module: nn.Module) -> bool:
    """Return whether a hook of accelerate runs around a module's forward."""
    return _HOOK in module.__dict__


def offloading(module: nn.Module) -> Any:
    """Return the hook that brings a module's weights for each forward; None where they stay."""
    return next((hook for hook in hooks_of(module) if getattr(hook, "offload", False)), None)


def is_offloaded(module: nn.Module) -> bool:
    """Return whether a module's own weights are on meta tensors, and a hook knows their values."""
    return offloading(module) is not None and any(p is not None and p.is_meta for p in module._parameters.values())


def value_of(module: nn.Module, name: str, tensor: Tensor) -> Tensor:
    """Return the value of a module's own tensor: what its hook holds where it is on meta, itself otherwise."""
    hook = offloading(module) if tensor.is_meta else None
    if hook is None:
        return tensor
    value: Tensor = hook.weights_map[name]
    return value


def device_of(module: nn.Module, name: str, tensor: Tensor) -> torch.device:
    """Return the device on which a module's own tensor is when its forward runs."""
    hook = offloading(module) if tensor.is_meta else None
    if hook is None:
        return tensor.device
    if hook.execution_device is not None:
        return torch.device(hook.execution_device)
    return value_of(module, name, tensor).device
