"""Stand-ins: a module's own code run on other parameters, without writing to the module."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from deltaspec.backbone.offload import brought, is_hooked
from deltaspec.backbone.weight_forms import is_plain, own_values, plain_class


def stand_in(module: nn.Module, tensors: dict[str, Any]) -> nn.Module:
    """Make a shallow copy of a module, without its instance-level forward, that holds `tensors` by own name.

    What is offloaded is brought. In the place of a weight that is kept as codes, or computed, it holds plain values,
    which torch's class runs on.
    """
    kind = plain_class(module) if "weight" in tensors and not is_plain(module) else module.__class__
    shadow: nn.Module = kind.__new__(kind)
    attributes = shadow.__dict__
    attributes.update(module.__dict__)
    attributes.pop("forward", None)
    attributes["_parameters"] = {**module._parameters}
    for name, parameter in module._parameters.items() if is_hooked(module) else ():
        if parameter is not None and name not in tensors:
            attributes["_parameters"][name] = brought(module, name, parameter)
    attributes["_buffers"] = {**module._buffers}
    attributes["_modules"] = {**module._modules}
    if "weight" in tensors:  # what a hook computed for it
        attributes.pop("weight", None)
    for name, tensor in tensors.items():
        home = attributes["_buffers"] if name in module._buffers else attributes["_parameters"]
        home[name] = tensor
    if kind is not module.__class__ and (bias := attributes["_parameters"].get("bias")) is not None:
        # A library's kernel casts it on the way; torch's wants one dtype.
        attributes["_parameters"]["bias"] = bias.to(tensors["weight"].dtype)
    if attributes.get("sparse") is True and "weight" in tensors and not tensors["weight"].is_leaf:
        # An embedding's sparse gradients are for an optimizer; what computed this weight takes dense ones.
        attributes["sparse"] = False
    if "_flat_weights_names" in attributes:
        # nn.LSTM and its kin compute from this list, not from their attributes.
        attributes["_flat_weights"] = [getattr(shadow, name) for name in attributes["_flat_weights_names"]]
    return shadow


_REGISTRIES = nn.Module().__dict__.keys() | {"forward", "sparse", "weight", "_flat_weights"}


State = list[tuple[nn.Module, nn.Module, dict[str, Any]]]
"""Modules with their stand-ins, and what those had in their attributes."""


def states(module: nn.Module, shadow: nn.Module) -> State:
    """Return what a stand-in, and those of its children, have before their forward runs; see `keep_state`.

    Dynamo knows no way to keep a state, so a compiled forward leaves none.
    """
    if _compiling():
        return []
    found: State = [(module, shadow, dict(shadow.__dict__))]
    for name, child in shadow._modules.items():
        below = module._modules.get(name)
        if child is not None and below is not None and child is not below:
            found += states(below, child)
    return found


def keep_state(before: State) -> None:
    """Give modules what a forward of their stand-ins left in attributes: recurrent states, caches, counts."""
    for module, shadow, attributes in before:
        for name, value in shadow.__dict__.items():
            if name not in _REGISTRIES and (name not in attributes or attributes[name] is not value):
                module.__dict__[name] = value


_compiling = torch.compiler.is_compiling


WEIGHT_FACTOR = "weight_factor"


class Swapped:
    """The module's own forward, with parameters given at each call; a weight may be given as a factor of its own."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def __call__(self, parameters: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Run the module."""
        if WEIGHT_FACTOR in parameters:
            parameters = {**parameters}
            factor, weight = parameters.pop(WEIGHT_FACTOR), own_values(self.module)["weight"]
            parameters["weight"] = weight * factor.to(weight.dtype)
        shadow = stand_in(self.module, parameters)
        before = states(self.module, shadow)
        output = shadow.forward(*args, **kwargs)
        keep_state(before)
        return output


def no_gradient_of_padding(module: nn.Module, x: Tensor, leaving: Tensor) -> Tensor:
    """Let what an embedding gives for its `padding_idx` have no gradient: under vmap torch forgets it."""
    if not isinstance(module, nn.Embedding) or module.padding_idx is None or not torch.is_grad_enabled():
        return leaving
    return torch.where((x == module.padding_idx).unsqueeze(-1), leaving.detach(), leaving)
