"""The forms that modules keep weights in: plain values, codes that stand for values, or computed from other tensors.

No library that packs weights is imported. Classes and attributes tell what a tensor is; what its codes stand for says
its own library, which is loaded where there is such a tensor.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import replace
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.parameter import is_lazy
from torch.nn.utils.parametrize import is_parametrized, type_before_parametrizations

from deltaspec.backbone.offload import brought, value_of
from deltaspec.backbone.table import Packed

_VALUES = frozenset(
    (torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.complex64, torch.complex128, torch.complex32)
)
"""dtypes whose numbers are the values themselves. What is smaller comes with scales that are kept elsewhere."""
_WIDTHS = (("out_features", "in_features"), ("num_embeddings", "embedding_dim"))
"""Names under which modules hold the shape of their weight."""
_HOLDERS = ("weight", "qweight", "weight_packed", "W_q")
"""Names under which libraries keep a linear layer's codes, as parameter or as buffer."""


def packed_form(tensor: Tensor) -> Packed | None:
    """Return the form of an own tensor that is kept as codes; None for one that is kept as its values."""
    kind = type(tensor)
    if kind is nn.Parameter and tensor.dtype in _VALUES:
        return None
    if kind.__name__ == "Params4bit":
        return Packed(f"bitsandbytes 4-bit ({getattr(tensor, 'quant_type', 'fp4')})", True)
    if kind.__name__ == "Int8Params":
        return Packed("bitsandbytes 8-bit", True) if tensor.dtype == torch.int8 else None
    if tensor.is_quantized or getattr(kind, "dequantize", None) is not Tensor.dequantize:
        library = kind.__module__.removeprefix("optimum.").partition(".")[0]
        return Packed(f"{library} {kind.__name__}", True)
    if tensor.dtype in _VALUES or is_lazy(tensor):
        return None
    name = str(tensor.dtype).removeprefix("torch.")
    return Packed(name if tensor.is_floating_point() else f"packed {name}", False)


def packed_weight(module: nn.Module) -> tuple[Packed, Tensor] | None:
    """Return the form and the codes of a module's weight, if it is kept as codes, under whatever name."""
    weight = module._parameters.get("weight")
    if type(weight) is nn.Parameter and weight.dtype in _VALUES:  # nearly all, so it is asked first
        return None
    shaped = _shape(module) is not None
    if weight is not None:
        form = packed_form(weight) if shaped or isinstance(module, _ConvNd) else None
        return None if form is None else (form, weight)
    if not shaped or "weight" in module.__dict__ or "parametrizations" in module._modules:
        return None
    for name, codes in (*module._buffers.items(), *module._parameters.items()):
        if codes is None or codes.dim() < 2 or not (name in _HOLDERS or isinstance(module, nn.Linear)):
            continue
        if (form := packed_form(codes)) is not None:
            offered = isinstance(getattr(type(module), "weight", None), property)
            return replace(form, readable=form.readable or offered), codes
    return None


def is_packed(module: nn.Module) -> bool:
    """Return whether a module keeps its weight as codes."""
    return packed_weight(module) is not None


def is_plain(module: nn.Module) -> bool:
    """Return whether a module's class finds its weight, if it has one, as a parameter of plain values."""
    if module._parameters.get("weight") is None:
        return "parametrizations" not in module._modules and not is_packed(module)
    return not is_packed(module)


def shape_of_values(module: nn.Module, form: Packed, codes: Tensor) -> tuple[int, ...]:
    """Return the shape of the values that a packed weight stands for."""
    state = getattr(codes, "quant_state", None)
    if state is not None:
        return tuple(state.shape)
    known = None if form.readable and module._parameters.get("weight") is codes else _shape(module)
    return tuple(codes.shape) if known is None else known


def _shape(module: nn.Module) -> tuple[int, int] | None:
    """Return the shape of a linear layer's or an embedding's weight by its attributes; None where it has none."""
    own = module.__dict__
    for rows, columns in _WIDTHS:
        if isinstance(own.get(rows), int) and isinstance(own.get(columns), int):
            return own[rows], own[columns]
    return None


def own_shape(module: nn.Module, name: str) -> tuple[int, ...] | None:
    """Return the shape of an own tensor's values, computed ones included; None where there is none of this name."""
    if name == "weight" and (packed := packed_weight(module)) is not None:
        return shape_of_values(module, *packed)
    found = getattr(module, name, None)
    return tuple(found.shape) if isinstance(found, Tensor) else None


def sizes(module: nn.Module) -> Iterator[tuple[Tensor, int]]:
    """Yield a module's own parameters with the number of values that each stands for; scales of codes stand for none.

    Codes that are kept in a buffer count as the parameter that they stand for.
    """
    packed = packed_weight(module)
    if packed is not None:
        yield packed[1], prod(shape_of_values(module, *packed))
    for name, parameter in module._parameters.items():
        if parameter is not None and (packed is None or name == "bias"):
            yield parameter, 0 if is_lazy(parameter) else parameter.numel()


def values_of(module: nn.Module, name: str = "weight") -> Tensor:
    """Return the values of an own tensor: the parameter itself, what codes stand for, or what is computed for it.

    Raises TypeError for codes that only their module can read: plans refuse what would ask for them.
    """
    packed = packed_weight(module) if name == "weight" else None
    if packed is None:
        found = module._parameters.get(name)
        return _computed(module, name) if found is None else value_of(module, name, found)
    form, codes = packed
    if not form.readable:
        raise TypeError(f"nothing says what values the {form.name} of this {type(module).__name__} stands for")
    with torch.no_grad():
        return _dequantised(module, codes)


def own_values(module: nn.Module) -> dict[str, Tensor]:
    """Return the values of all own parameters, by own name, of those that can be read."""
    own = {name: brought(module, name, value) for name, value in module._parameters.items() if value is not None}
    if (packed := packed_weight(module)) is None:
        return own
    values = {"weight": values_of(module)} if packed[0].readable else {}
    return values | {name: value for name, value in own.items() if name == "bias"}


def dtype_of_values(module: nn.Module) -> torch.dtype | None:
    """Return the dtype in which a module's own parameters are values; None where none is."""
    if (packed := packed_weight(module)) is not None and packed[0].readable:
        state = getattr(packed[1], "quant_state", None)
        if state is not None:
            found: torch.dtype = state.dtype
            return found
    own = (parameter for parameter in module._parameters.values() if parameter is not None)
    return next((parameter.dtype for parameter in own if parameter.dtype in _VALUES), None)


def _dequantised(module: Any, codes: Any) -> Tensor:
    name = type(codes).__name__
    if module._parameters.get("weight") is not codes:
        offered: Tensor = module.weight  # a property of its class
        return offered
    if name not in ("Params4bit", "Int8Params"):
        values: Tensor = codes.dequantize()
        return values
    library = sys.modules[type(codes).__module__.partition(".")[0]].functional
    if name == "Params4bit":
        state = codes.quant_state if codes.quant_state is not None else getattr(module, "quant_state", None)
        values = codes if state is None else library.dequantize_4bit(codes.data, state)  # None: not packed yet
    else:
        scales = codes.SCB if codes.SCB is not None else module.state.SCB
        values = library.int8_vectorwise_dequant(codes.data, scales.to(codes.device))
    return values.detach()


def _computed(module: nn.Module, name: str) -> Tensor:
    """Return a tensor that a hook or a parametrisation computes, computed anew from the parameters as they are."""
    for hook in module._forward_pre_hooks.values():
        maker: Any = hook
        if getattr(maker, "_tensor_name", None) == name:  # pruning
            pruned: Tensor = maker.apply_mask(module)
            return pruned
        if getattr(maker, "name", None) == name and hasattr(maker, "compute_weight"):  # the older norms
            extra = (False,) if hasattr(maker, "n_power_iterations") else ()
            normed: Tensor = maker.compute_weight(module, *extra)
            return normed
    found: Tensor = getattr(module, name)
    return found


def plain_class(module: nn.Module) -> Any:
    """Return the class of torch (or transformers' Conv1D) that computes what a module does, of plain values."""
    if is_parametrized(module):
        return type_before_parametrizations(module)
    for kind in type(module).__mro__:
        if kind is not nn.Module and (kind.__module__.startswith("torch.nn.modules.") or kind.__name__ == "Conv1D"):
            return kind
    return nn.Linear  # what has the widths of one, and keeps codes for it


def unpacked_class(module: nn.Module) -> Any:
    """Return the class that a packed module has in a model of plain weights."""
    made_of = module.__dict__.get("source_cls")  # transformers says so of what it makes for bitsandbytes
    return made_of if isinstance(made_of, type) and issubclass(made_of, nn.Module) else plain_class(module)
