"""A structural copy of a model that shares its weights: the copy can be rewritten, the model is never touched."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Container
from functools import cache
from types import FunctionType
from typing import Any

import torch
from torch import fx, nn

from deltaspec.diagnostics.findings import DeltaSpecError, Diagnostic


def clone(model: nn.Module, *, device: str | None = None, replace: dict[int, Any] | None = None) -> nn.Module:
    """Copy a model's structure in milliseconds; ties between parameters are kept.

    Parameters become new `Parameter`s on the same storage (same device, dtype, `requires_grad`, no `.grad`); buffers
    are copied, so that BatchNorm in training mode cannot reach the original. With `device="meta"` both become empty
    meta tensors instead. `replace` maps `id(object)` to what stands for it in the copy. Raises DeltaSpecError (DS430)
    where the model holds something that cannot be copied.
    """
    memo: dict[int, Any] = dict(replace or {})
    modules = _copied(model, memo)
    for module in modules:
        for parameter in module._parameters.values():
            if parameter is not None and id(parameter) not in memo:
                if parameter.is_inference():
                    raise _not_copied(model, "its parameters were made under torch.inference_mode")
                memo[id(parameter)] = _share(parameter, device)
        if device is not None:
            for buffer in module._buffers.values():
                if buffer is not None:
                    memo[id(buffer)] = torch.empty_like(buffer, device=device)
        for value in module.__dict__.values():
            # weight_norm and the like keep a computed tensor as a plain attribute, which deepcopy refuses.
            if type(value) not in _PLAIN and isinstance(value, torch.Tensor) and not value.is_leaf:
                memo[id(value)] = value.detach().clone()
    for module in modules:
        # Embeddings with a maximal norm write to their weight in every forward; that must not reach the original.
        if norm_limited(module) and isinstance(weight := getattr(module, "weight", None), nn.Parameter):
            memo[id(weight)] = _twin(weight, memo[id(weight)].detach().clone())
    try:
        return deep_copy(model, memo)
    except (TypeError, RuntimeError, AttributeError) as error:
        raise _not_copied(model, str(error)) from error


def hollow(model: nn.Module) -> nn.Module:
    """Copy the structure of a model that has no values onto the CPU, with zeros in their place.

    All values of a parameter are one element of memory, so that a forward can look at values that depend on its inputs
    alone, such as those of a mask.
    """
    twin = clone(model, device="meta")
    made: dict[int, torch.Tensor] = {}

    def filled(tensor: torch.Tensor) -> torch.Tensor:
        if id(tensor) not in made:
            zero = torch.zeros((), dtype=tensor.dtype).expand(tensor.shape)
            made[id(tensor)] = nn.Parameter(zero, False) if isinstance(tensor, nn.Parameter) else zero.clone()
        return made[id(tensor)]

    for module in twin.modules():
        registries: tuple[dict[str, Any], ...] = (module._parameters, module._buffers, module.__dict__)
        for members in registries:
            for name, value in members.items():
                if isinstance(value, torch.Tensor) and value.is_meta:
                    members[name] = filled(value)
    return twin


def _copied(model: nn.Module, replaced: Container[int]) -> list[nn.Module]:
    """Return the modules of a model, without those of these ids and what they alone hold: thousands of deltas, say."""
    found: dict[int, nn.Module] = {}
    waiting = [model]
    while waiting:
        module = waiting.pop()
        if id(module) not in found and id(module) not in replaced:
            found[id(module)] = module
            waiting += module.children()
    return list(found.values())


def _not_copied(model: nn.Module, reason: str) -> DeltaSpecError:
    hint = "build the model anew, or remove what cannot be copied (a lock, a stream, a cached result) before compiling"
    return DeltaSpecError([Diagnostic("DS430", f"{type(model).__name__} cannot be copied: {reason}", suggestion=hint)])


def norm_limited(module: nn.Module) -> bool:
    """Return whether a module is an embedding that shortens the rows of its weight to a maximal norm, in place."""
    own = module.__dict__
    return (own["max_norm"] if "max_norm" in own else getattr(type(module), "max_norm", None)) is not None


_ATOMS = (bool, int, float, complex, str, bytes, type(None), type, FunctionType, torch.dtype, torch.device, torch.Size)
_KNOWN_ATOMS = frozenset(_ATOMS)
_EMPTY = frozenset((dict, OrderedDict, list, set))
_PLAIN = _KNOWN_ATOMS | _EMPTY
_HOOKS = ("__deepcopy__", "__reduce__", "__reduce_ex__", "__getstate__", "__setstate__", "__copy__")


def deep_copy(module: nn.Module, memo: dict[int, Any]) -> nn.Module:
    """Do what copy.deepcopy does, faster for plain modules, most of whose attributes are plain or empty.

    A GraphModule's own `__deepcopy__` leaves out its hooks, its attributes and an overridden forward; here they stay.
    """
    found = memo.get(id(module))
    if found is not None:
        assert isinstance(found, nn.Module)
        return found
    kind: Any = type(module)
    traced = isinstance(module, fx.GraphModule)
    if not traced and not _is_plain(kind):
        return copy.deepcopy(module, memo)
    twin: nn.Module = kind.__new__(kind)
    memo[id(module)] = twin
    attributes = twin.__dict__
    for name, value in module.__dict__.items():
        form = type(value)
        if form in _KNOWN_ATOMS:
            attributes[name] = value
        elif traced and name == "_graph":
            continue
        elif form in _EMPTY and not value:
            attributes[name] = form()
        elif name == "_modules":
            children = ((key, None if child is None else deep_copy(child, memo)) for key, child in value.items())
            attributes[name] = form(children)
        elif name == "_parameters" and form is dict:
            attributes[name] = {key: None if one is None else copy.deepcopy(one, memo) for key, one in value.items()}
        elif (found := memo.get(id(value))) is not None:
            attributes[name] = found
        elif isinstance(value, _ATOMS):
            attributes[name] = value
        else:
            attributes[name] = copy.deepcopy(value, memo)
    if isinstance(module, fx.GraphModule) and isinstance(twin, fx.GraphModule):
        twin.graph = copy.deepcopy(module.graph, memo)  # compiles it into the class, of which each one has its own
    return twin


@cache
def _is_plain(kind: Any) -> bool:
    """Return whether a class leaves copying and pickling to nn.Module, and has no slots of its own."""
    plain = all(getattr(kind, hook, None) is getattr(nn.Module, hook, None) for hook in _HOOKS)
    return plain and not any("__slots__" in base.__dict__ for base in kind.__mro__[:-1])


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
