"""Plain modules in the place of those that keep their weights as codes."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from deltaspec.backbone.weight_forms import is_packed, plain_class, unpacked_class


def unpacked(module: nn.Module, values: dict[str, Tensor]) -> nn.Module:
    """Make a plain module of a packed one, of these parameters; hooks and modes stay, its library's parts do not."""
    kind, own = plain_class(module), module.__dict__
    made_of = unpacked_class(module)
    twin: nn.Module = made_of.__new__(made_of)
    nn.Module.__init__(twin)
    kept = {*getattr(kind, "__constants__", ()), *_KEPT}
    twin.__dict__.update({name: value for name, value in own.items() if name in kept})
    values = dict(values)
    if made_of is not kind:  # transformers' Conv1D, for which bitsandbytes has a Linear
        twin.__dict__.update(nf=own["out_features"], nx=own["in_features"])
        values["weight"] = values["weight"].t()
    for name in ("weight", "bias"):
        value = values.get(name)
        if value is not None:  # a library's kernel casts the bias on the way
            value = nn.Parameter(value.detach().to(values["weight"].dtype, copy=True).contiguous(), requires_grad=False)
        twin.register_parameter(name, value)
    return twin


_KEPT = {"in_features", "out_features", "nx", "nf", "training", "transposed", "_reversed_padding_repeated_twice",
         "_forward_hooks", "_forward_pre_hooks", "_forward_hooks_with_kwargs", "_forward_pre_hooks_with_kwargs",
         "_forward_hooks_always_called"}  # fmt: skip
"""Attributes that a plain module takes over from a packed one."""


def copies_of_codes(model: nn.Module) -> dict[int, Any]:
    """Return copies of the parameters that copy.deepcopy cannot copy, by their identity: tensors made of others."""
    copies: dict[int, Any] = {}
    for module in model.modules():
        for parameter in module._parameters.values():
            if parameter is not None and hasattr(parameter, "__tensor_flatten__"):
                copies[id(parameter)] = _copied(parameter)
    return copies


def _copied(tensor: Any) -> Any:
    """Copy a tensor and, where it is made of others, those."""
    if not hasattr(tensor, "__tensor_flatten__"):
        return tensor.detach().clone()
    names, context = tensor.__tensor_flatten__()
    inner = {name: _copied(getattr(tensor, name)) for name in names}
    made = type(tensor).__tensor_unflatten__(inner, context, tensor.size(), tensor.stride())
    return nn.Parameter(made, requires_grad=False) if isinstance(tensor, nn.Parameter) else made


def tell_unpacked(model: nn.Module) -> None:
    """Tell a transformers model's config which linear layers are no codes, so that loading packs no others."""
    config: Any = getattr(model, "config", None)
    quantisation = getattr(config, "quantization_config", None)
    for key in ("llm_int8_skip_modules", "modules_to_not_convert"):
        if hasattr(quantisation, key):
            plain = [name for name, module in model.named_modules() if _is_linear(module) and not is_packed(module)]
            setattr(quantisation, key, sorted({*(getattr(quantisation, key) or ()), *plain}))


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"
