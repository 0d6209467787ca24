"""Forwards on meta tensors, which take a test longer than anything else, run once for models that are built alike.

Without values, what torch's and transformers' code does follows from the modules' classes and settings, the shapes of
their tensors, the configuration and the inputs: that is the key. A model with anything else in it is observed anew.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from functools import partial
from types import BuiltinFunctionType, FunctionType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten
from transformers import GenerationConfig, PreTrainedConfig

from deltaspec.backbone.recorder import Observation
from deltaspec.backbone.writes import is_published

Seen = tuple[dict[str, Observation], str | None]
ATOMS = (bool, int, float, str, type(None), type, torch.dtype, torch.device)
MOST = 2000
"""Modules up to which a model is looked through."""


class Unknown(Exception):
    """Something that cannot be told from another thing of its kind."""


def remembering(observe: Callable[..., Seen]) -> Callable[..., Seen]:
    """Return a function that observes models that are built alike once."""
    known: dict[str, Seen] = {}

    def observed(model: nn.Module, example_inputs: Any = None) -> Seen:
        try:
            key = hashlib.sha256(repr(form(model, example_inputs)).encode()).hexdigest()
        except Unknown:
            return observe(model, example_inputs)
        if key not in known:
            known[key] = observe(model, example_inputs)
        seen, failure = known[key]
        return dict(seen), failure

    return observed


def form(model: nn.Module, example_inputs: Any) -> Any:
    """Describe a model by what a forward without values depends on. Raises Unknown."""
    modules = list(model.named_modules(remove_duplicate=False))
    if len(modules) > MOST or not all(is_published(module) for _, module in modules):
        raise Unknown
    numbers: dict[int, int] = {}
    given, structure = tree_flatten(example_inputs)
    around = (torch.get_default_dtype(), torch.get_default_device(), torch.is_autocast_enabled("cpu"))
    described = [(fqn, described_module(module, numbers)) for fqn, module in modules]
    return described, [value(leaf, numbers) for leaf in given], str(structure), around


def described_module(module: nn.Module, numbers: dict[int, int]) -> Any:
    kind: Any = type(module)
    if (number := numbers.get(id(module))) is not None:
        return number
    numbers[id(module)] = len(numbers)
    own = {name: value(held, numbers) for name, held in module.__dict__.items() if name != "_modules"}
    return kind.__module__, kind.__qualname__, id(kind.forward), list(module._modules), own


def value(held: Any, numbers: dict[int, int]) -> Any:
    """Describe a value; tensors that are one by the same number. Raises Unknown."""
    if isinstance(held, ATOMS):
        return held
    if isinstance(held, Tensor):
        if type(held) not in (Tensor, nn.Parameter):
            raise Unknown
        number = numbers.setdefault(id(held), len(numbers))
        # Inputs may be looked at, on the CPU: weights never are by published code.
        values = b"" if isinstance(held, nn.Parameter) or held.is_meta or held.numel() > 5000 else held.tolist()
        return number, type(held), held.shape, held.dtype, held.device, held.requires_grad, values
    if isinstance(held, PreTrainedConfig | GenerationConfig):
        return type(held).__qualname__, value(held.__dict__, numbers)
    if isinstance(held, dict):
        return [(value(key, numbers), value(item, numbers)) for key, item in held.items()]
    if isinstance(held, list | tuple | set | frozenset):
        return type(held), [value(item, numbers) for item in held]
    if isinstance(held, FunctionType) and held.__closure__ is None and not held.__dict__:
        return held.__module__, held.__qualname__
    if isinstance(held, BuiltinFunctionType) and isinstance(held.__self__, ModuleType | type | None):
        return held.__module__, held.__qualname__
    if type(held) is partial:
        return value(held.func, numbers), value(held.args, numbers), value(held.keywords, numbers)
    raise Unknown
