"""All that can be seen of a model, as a flat mapping: two moments, or two models, can be compared by it."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from deltaspec.names.paths import is_inside
from deltaspec.runtime.forward_gate import INSTALLED
from deltaspec.runtime.pickled_alone import MARK
from deltaspec.runtime.verbs import Verb


def snapshot(model: nn.Module, *, identity: bool = False, skip: str | None = None) -> dict[str, Any]:
    """Describe every module: class, `__dict__`, training flag, hooks; every parameter and buffer: bits, form, flags.

    `identity` adds what tells an object from its copy: ids, write counts, gradients. `skip` leaves out the direct
    child of that name and all below it, and what a compiled backbone does in its own way. Two snapshots of equal models
    are equal.
    """
    seen: dict[str, Any] = {}
    for fqn, module in model.named_modules(remove_duplicate=False):
        if skip is not None and is_inside(fqn, skip):
            continue
        place = f"{fqn}:" if fqn else ":"
        seen[f"{place}class"] = type(module)
        if identity:
            seen[f"{place}id"] = id(module)
        for name, value in module.__dict__.items():
            if skip is not None and (name in INSTALLED or name == MARK or isinstance(value, Verb)):
                continue
            if name == "_parameters" or name == "_buffers":
                for own, tensor in value.items():
                    seen[f"{place}{name}.{own}"] = _describe(tensor, identity)
            elif name == "_modules":
                seen[f"{place}{name}"] = [child for child in value if (f"{fqn}.{child}" if fqn else child) != skip]
            else:
                seen[f"{place}{name}"] = _describe(value, identity)
    return seen


def differences(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    """Name what differs between two snapshots: `encoder.0:training: False, then True`."""
    found = []
    for key in [*before, *(key for key in after if key not in before)]:
        if key not in after:
            found.append(f"{key} is gone")
        elif key not in before:
            found.append(f"{key} is new: {after[key]}")
        elif before[key] != after[key]:
            found.append(f"{key}: {before[key]}, then {after[key]}")
    return found


def _describe(value: Any, identity: bool) -> Any:
    """Reduce a value to something that `==` compares: tensors to their bits, strangers to their kind."""
    if isinstance(value, Tensor):
        form = (type(value), tuple(value.shape), str(value.dtype), str(value.device))
        described = (*form, value.requires_grad, _digest(value))
        return (*described, id(value), value._version, id(value.grad)) if identity and value.is_leaf else described
    if isinstance(value, Mapping):
        return {k if isinstance(k, int | str) else str(k): _describe(item, identity) for k, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        items = [_describe(item, identity) for item in value]
        return sorted(items, key=repr) if isinstance(value, set | frozenset) else items
    if isinstance(value, int | float | complex | str | bytes | torch.dtype | torch.device | type | None):
        return value
    return id(value) if identity else getattr(value, "__qualname__", type(value))


def _digest(tensor: Tensor) -> str:
    if tensor.is_meta:
        return "meta"
    raw = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    return hashlib.sha256(raw.numpy().tobytes()).hexdigest()[:16]
