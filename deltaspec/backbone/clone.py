"""A structural copy of a model that shares its weights: the copy can be rewritten, the model is never touched."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from deltaspec.backbone.copying import PLAIN, deep_copy, not_copied
from deltaspec.backbone.holding import subtree
from deltaspec.backbone.offload import shared_maps


def clone(
    model: nn.Module, *, device: str | None = None, replace: dict[int, Any] | None = None, own: bool = False
) -> nn.Module:
    """Copy a model's structure in milliseconds; ties between parameters are kept.

    Parameters become new `Parameter`s on the same storage (same device, dtype, `requires_grad`, no `.grad`); buffers
    are copied, so that BatchNorm in training mode cannot reach the original. With `device="meta"` both become empty
    meta tensors instead; with `own` parameters are copied, too. `replace` maps `id(object)` to what stands for it in
    the copy. Raises DeltaSpecError (DS430) where the model holds something that cannot be copied.
    """
    memo: dict[int, Any] = dict(replace or {})
    modules = subtree(model, memo)
    for module in modules:
        for parameter in module._parameters.values():
            if parameter is not None and id(parameter) not in memo:
                if parameter.is_inference():
                    raise not_copied(model, "its parameters were made under torch.inference_mode")
                memo[id(parameter)] = _twin(parameter, parameter.detach().clone()) if own else _share(parameter, device)
        if device is not None:
            for buffer in module._buffers.values():
                if buffer is not None:
                    memo[id(buffer)] = torch.empty_like(buffer, device=device)
        memo |= {id(held): held for held in shared_maps(module)}
        for value in module.__dict__.values():
            # weight_norm and the like keep a computed tensor as a plain attribute, which deepcopy refuses.
            if type(value) not in PLAIN and isinstance(value, torch.Tensor) and not value.is_leaf:
                memo[id(value)] = value.detach().clone()
    for module in modules:
        # Embeddings with a maximal norm write to their weight in every forward; that must not reach the original.
        if norm_limited(module) and isinstance(weight := getattr(module, "weight", None), nn.Parameter):
            memo[id(weight)] = _twin(weight, memo[id(weight)].detach().clone())
    return deep_copy(model, memo)


def hollow(model: nn.Module) -> nn.Module:
    """Copy the structure of a model that has no values onto the CPU, with zeros in their place.

    All values of a parameter are one element of memory, so that a forward can look at values that depend on its inputs
    alone, such as those of a mask.
    """
    twin = clone(model, device="meta")
    made: dict[int, torch.Tensor] = {}

    def filled(tensor: torch.Tensor) -> torch.Tensor:
        if id(tensor) not in made:
            zero = torch.zeros((), dtype=tensor.dtype, device="cpu").expand(tensor.shape)
            made[id(tensor)] = nn.Parameter(zero, False) if isinstance(tensor, nn.Parameter) else zero.clone()
        return made[id(tensor)]

    for module in twin.modules():
        registries: tuple[dict[str, Any], ...] = (module._parameters, module._buffers, module.__dict__)
        for members in registries:
            for name, value in members.items():
                if isinstance(value, torch.Tensor) and value.is_meta:
                    members[name] = filled(value)
    return twin


def norm_limited(module: nn.Module) -> bool:
    """Return whether a module is an embedding that shortens the rows of its weight to a maximal norm, in place."""
    own = module.__dict__
    return (own["max_norm"] if "max_norm" in own else getattr(type(module), "max_norm", None)) is not None


def _share(parameter: nn.Parameter, device: str | None) -> torch.Tensor:
    """Return a new parameter on the same storage (or an empty one on `device`), of the same class and attributes."""
    if device is not None:
        data = torch.empty_like(parameter, device=device)
    else:  # `_make_subclass` detaches by itself
        data = parameter if type(parameter) is nn.Parameter else parameter.detach()
    return _twin(parameter, data)


def _twin(parameter: nn.Parameter, data: torch.Tensor) -> torch.Tensor:
    twin: torch.Tensor = torch.Tensor._make_subclass(type(parameter), data, parameter.requires_grad)
    if parameter.__dict__:
        twin.__dict__.update(parameter.__dict__)
    return twin
