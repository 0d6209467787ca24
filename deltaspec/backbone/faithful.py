"""Modules of a known kind with a forward of their own, which may compute something else than torch's class.

The forward may be the class's, or one that was put onto the module.

A method that is written for a Linear adds to what leaves a Linear. A router that is a Linear but returns scores, or a
LayerNorm that has its channels first, takes a change of its weight all the same, and only that.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from deltaspec.backbone.copying import copy_held
from deltaspec.backbone.forwards import foreign_forward
from deltaspec.backbone.holding import parts_of
from deltaspec.backbone.random_state import seeded_on_cpu

_BATCH, _IN, _OUT = (2, 5), 4, 3
_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def is_faithful(module: nn.Module, kind: str) -> bool:
    """Return whether a module computes what torch's (or transformers') class of its kind does.

    A forward of its own is tried on random values, in a small copy; what cannot be tried counts as another computation.
    Norms that are known by name only have no such class, and count as faithful to their own. So do quantised layers,
    whose weight has another form.
    """
    known: Any = next((base for base in type(module).__mro__ if _is_known(base)), type(module))
    weight, foreign = module._parameters.get("weight"), foreign_forward(module)
    if foreign is None and type(module).forward is known.forward:
        return True
    if type(weight) is not nn.Parameter or weight.dtype not in _DTYPES:
        return True
    if module._modules or _reads_others(foreign, module):  # which the copy would share, with what they write
        return False
    place = weight.device if foreign is not None and not weight.is_meta else torch.device("cpu")
    try:
        with torch.no_grad(), seeded_on_cpu(0), place:
            twin = _small(module, kind)
            forward = type(twin).forward if foreign is None else _moved(foreign, module, twin)
            return _agree(twin, known, kind, forward)
    except Exception:  # whatever a stranger's forward raises on inputs that its class takes
        return False


def _is_known(kind: type) -> bool:
    home = kind.__module__
    return kind is not nn.Module and (home.startswith("torch.nn.modules.") or home == "transformers.pytorch_utils")


def _reads_others(forward: Any, module: nn.Module) -> bool:
    """Return whether a forward that was put onto a module leads to other modules."""
    waiting, seen = [forward], {id(module)}
    while waiting:
        held = waiting.pop()
        if id(held) in seen:
            continue
        if isinstance(held, nn.Module):
            return True
        seen.add(id(held))
        waiting += parts_of(held)
    return False


def _moved(forward: Any, module: nn.Module, twin: nn.Module) -> Callable[..., Any]:
    """Return a forward that was put onto a module as a function of its copy, and bound to that."""
    memo: dict[int, Any] = {id(module): twin}
    for home, copied in ((module._parameters, twin._parameters), (module._buffers, twin._buffers)):
        memo |= {id(tensor): copied[name] for name, tensor in home.items() if tensor is not None}
    bound = copy_held(forward, module, memo)
    return lambda _, *args: bound(*args)


def _small(module: nn.Module, kind: str) -> nn.Module:
    """Copy a module with random parameters; a linear layer becomes a small one."""
    twin: nn.Module = type(module).__new__(type(module))
    own = {name: value.copy() if isinstance(value, dict) else value for name, value in module.__dict__.items()}
    twin.__dict__.update(own)
    shapes = {name: tuple(p.shape) for name, p in module._parameters.items() if p is not None}
    if kind == "linear":
        shapes = {**dict.fromkeys(shapes, (_OUT,)), "weight": (_OUT, _IN)}
        twin.__dict__.update(in_features=_IN, out_features=_OUT)
    elif kind == "conv1d":
        shapes = {**dict.fromkeys(shapes, (_OUT,)), "weight": (_IN, _OUT)}
        twin.__dict__.update(nx=_IN, nf=_OUT)
    for name, shape in shapes.items():
        twin._parameters[name] = nn.Parameter(_drawn(shape), requires_grad=False)
    for name, buffer in module._buffers.items():
        if buffer is not None:
            drawn = torch.rand(buffer.shape, dtype=torch.float32, device="cpu")
            twin._buffers[name] = drawn.to(torch.get_default_device(), buffer.dtype)
    twin.training = False
    return twin


def _drawn(shape: tuple[int, ...]) -> Tensor:
    return torch.randn(shape, dtype=torch.float32, device="cpu").to(torch.get_default_device())


def _agree(twin: nn.Module, known: Any, kind: str, forward: Callable[..., Any]) -> bool:
    for shape in _inputs(twin, kind):
        x = _drawn(shape)
        try:
            wanted: Tensor = known.forward(twin, x.clone())
        except (RuntimeError, ValueError):  # another number of dimensions, for norms with channels first
            continue
        found: Any = forward(twin, x.clone())
        same = isinstance(found, Tensor) and found.shape == wanted.shape and found.dtype == wanted.dtype
        return same and torch.allclose(found, wanted, rtol=1e-4, atol=1e-5)
    return False


def _inputs(twin: nn.Module, kind: str) -> list[tuple[int, ...]]:
    weight = twin._parameters["weight"]
    assert weight is not None
    if kind != "norm":
        return [(*_BATCH, _IN)]
    if not isinstance(twin, nn.GroupNorm | _NormBase):
        return [(2, 5 if weight.shape[0] != 5 else 7, *weight.shape)]
    return [(2, *weight.shape, *(5, 3, 2)[:dims]) for dims in (1, 2, 3, 0)]
