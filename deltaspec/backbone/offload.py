"""Weights that are elsewhere: accelerate keeps them on meta tensors, and a hook brings them for each forward."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

_HOOK, _BEFORE = "_hf_hook", "_old_forward"


def is_hooked(module: nn.Module) -> bool:
    """Return whether a hook of accelerate runs around a module's forward."""
    return _HOOK in module.__dict__


def before_hook(module: nn.Module, forward: Any) -> Any:
    """Return the forward that a module had before accelerate's hook, where it has one; else the given one."""
    return module.__dict__.get(_BEFORE, forward) if is_hooked(module) else forward


def _hooks(module: nn.Module) -> Iterator[Any]:
    hook = module.__dict__.get(_HOOK)
    if hook is not None:
        yield from getattr(hook, "hooks", (hook,))


def _bringing(module: nn.Module, tensor: Tensor) -> Any:
    """Return the hook that brings this own tensor of a module; None where it stays."""
    if not tensor.is_meta:
        return None
    return next((hook for hook in _hooks(module) if getattr(hook, "offload", False)), None)


def is_offloaded(module: nn.Module, tensor: Tensor) -> bool:
    """Return whether an own tensor of a module is on meta, and a hook brings its values."""
    return _bringing(module, tensor) is not None


def brings_weights(module: nn.Module) -> bool:
    """Return whether a hook brings weights for a module's forward: its own, or those of all below it."""
    return any(getattr(hook, "offload", False) for hook in _hooks(module))


def is_elsewhere(module: nn.Module) -> bool:
    """Return whether a module's own parameters are offloaded."""
    return any(p is not None and is_offloaded(module, p) for p in module._parameters.values())


def value_of(module: nn.Module, name: str, tensor: Tensor) -> Tensor:
    """Return the value of an own tensor of a module: what its hook holds, or the tensor itself."""
    hook = _bringing(module, tensor)
    if hook is None:
        return tensor
    value: Tensor = hook.weights_map[name]
    return value


def device_of(module: nn.Module, name: str, tensor: Tensor) -> torch.device:
    """Return the device on which an own tensor of a module is while its forward runs."""
    hook = _bringing(module, tensor)
    if hook is None:
        return tensor.device
    if hook.execution_device is None:
        return value_of(module, name, tensor).device
    return torch.device(hook.execution_device)


def brought(module: nn.Module, name: str, tensor: Tensor) -> Tensor:
    """Return an own tensor of a module as it is while its forward runs: its value, where that runs."""
    if not is_offloaded(module, tensor):
        return tensor
    return value_of(module, name, tensor).to(device_of(module, name, tensor))


def put(module: nn.Module, name: str, value: Tensor) -> None:
    """Give an offloaded tensor of a module another value: its hook holds that in memory from now on."""
    place: Any = next(hook for hook in _hooks(module) if getattr(hook, "offload", False)).weights_map
    parameter = module._parameters[name]
    if parameter is None:
        parameter = module._parameters[name] = nn.Parameter(torch.empty_like(value, device="meta"), value.requires_grad)
    while hasattr(place, "dataset"):  # a prefix before another map
        name, place = f"{place.prefix}{name}", place.dataset
    getattr(place, "state_dict", place)[name] = value.to("cpu", parameter.dtype)


def shared_maps(module: nn.Module) -> Iterator[Any]:
    """Yield what a module's hooks hold the weights in, which a copy that shares the weights shares."""
    for hook in _hooks(module):
        for name in ("weights_map", "tied_params_map"):
            if (held := getattr(hook, name, None)) is not None:
                yield held


def unhook(model: nn.Module) -> None:
    """Take accelerate's hooks off a copy of a model that has no values."""
    for module in model.modules():
        if is_hooked(module):
            before = module.__dict__.pop(_BEFORE, None)
            module.__dict__.pop("forward", None)
            del module.__dict__[_HOOK]
            if getattr(before, "__func__", None) is not type(module).forward and before is not None:
                module.__dict__["forward"] = before
