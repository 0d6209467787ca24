"""A structural copy of a model that shares its weights: the copy can be rewritten, the model is never touched."""

from __future__ import annotations

import copy
from collections import OrderedDict
from functools import cache
from types import FunctionType
from typing import Any

import torch
from torch import nn

from deltaspec.diagnostics import DeltaSpecError, Diagnostic


def clone(model: nn.Module, *, device: str | None = None, replace: dict[int, Any] | None = None) -> nn.Module:
    """Copy a model's structure in milliseconds; ties between parameters are kept.

    Parameters become new `Parameter`s on the same storage (same device, dtype, `requires_grad`, no `.grad`); buffers
    are copied, so that BatchNorm in training mode cannot reach the original. With `device="meta"` both become empty
    meta tensors instead. `replace` maps `id(object)` to what stands for it in the copy. Raises DeltaSpecError (DS430)
    where the model holds something that cannot be copied.
    """
    memo: dict[int, Any] = dict(replace or {})
    # Embeddings with a maximal norm write to their weight in every forward; that must not reach the original.
    written = {
        id(m.weight) for m in model.modules() if getattr(m, "max_norm", None) is not None and hasattr(m, "weight")
    }
    for parameter in model.parameters():
        if parameter.is_inference():
            raise _not_copied(model, "its parameters were made under torch.inference_mode")
        memo[id(parameter)] = _share(parameter, device)
        if id(parameter) in written:
            memo[id(parameter)].data = memo[id(parameter)].data.clone()
    if device is not None:
        for buffer in model.buffers():
            memo[id(buffer)] = torch.empty_like(buffer, device=device)
    for module in model.modules():
        for value in module.__dict__.values():
            # weight_norm and the like keep a computed tensor as a plain attribute, which deepcopy refuses.
            if isinstance(value, torch.Tensor) and not value.is_leaf:
                memo[id(value)] = value.detach().clone()
    try:
        return _copy(model, memo)
    except (TypeError, RuntimeError, AttributeError) as error:
        raise _not_copied(model, str(error)) from error


def _not_copied(model: nn.Module, reason: str) -> DeltaSpecError:
    hint = "build the model anew, or remove what cannot be copied (a lock, a stream, a cached result) before compiling"
    return DeltaSpecError([Diagnostic("DS430", f"{type(model).__name__} cannot be copied: {reason}", suggestion=hint)])


_ATOMS = (bool, int, float, complex, str, bytes, type(None), type, FunctionType, torch.dtype, torch.device, torch.Size)
_EMPTY = (dict, OrderedDict, list, set)
_HOOKS = ("__deepcopy__", "__reduce__", "__reduce_ex__", "__getstate__", "__setstate__", "__copy__")


def _copy(module: nn.Module, memo: dict[int, Any]) -> nn.Module:
    """Do what copy.deepcopy does, faster for plain modules, most of whose attributes are plain or empty."""
    found = memo.get(id(module))
    if found is not None:
        assert isinstance(found, nn.Module)
        return found
    kind: Any = type(module)
    if not _is_plain(kind):
        return copy.deepcopy(module, memo)
    twin: nn.Module = kind.__new__(kind)
    memo[id(module)] = twin
    attributes = twin.__dict__
    for name, value in module.__dict__.items():
        if isinstance(value, _ATOMS):
            attributes[name] = value
        elif type(value) in _EMPTY and not value:
            attributes[name] = type(value)()
        elif name == "_modules":
            attributes[name] = type(value)(
                (key, None if child is None else _copy(child, memo)) for key, child in value.items()
            )
        else:
            attributes[name] = copy.deepcopy(value, memo)
    return twin


@cache
def _is_plain(kind: Any) -> bool:
    """Tell whether a class leaves copying and pickling to nn.Module, and has no slots of its own."""
    plain = all(getattr(kind, hook, None) is getattr(nn.Module, hook, None) for hook in _HOOKS)
    return plain and not any("__slots__" in base.__dict__ for base in kind.__mro__[:-1])


def _share(parameter: nn.Parameter, device: str | None) -> torch.Tensor:
    """Give a new parameter on the same storage (or an empty one on `device`), of the same class and attributes."""
    data = parameter.detach() if device is None else torch.empty_like(parameter, device=device)
    if type(parameter) is nn.Parameter:
        twin: torch.Tensor = nn.Parameter(data, requires_grad=parameter.requires_grad)
    else:
        twin = torch.Tensor._make_subclass(type(parameter), data, parameter.requires_grad)
    if parameter.__dict__:
        twin.__dict__.update(parameter.__dict__)
    return twin
