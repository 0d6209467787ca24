"""Signatures of forwards: reading one of transformers' takes longer than planning a layer, so each is read once."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from functools import cache
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from deltaspec.backbone.holding import COMPILED
from deltaspec.backbone.offload import before_hook


@cache
def arguments_of(forward: Callable[..., Any]) -> tuple[inspect.Parameter, ...]:
    """Return the parameters of a class's forward, without `self`."""
    return tuple(inspect.signature(forward).parameters.values())[1:]


@cache
def names_in(forward: Callable[..., Any]) -> tuple[str, ...]:
    """Return the names that a forward's code looks up, as far as there is code to look at."""
    code = getattr(inspect.unwrap(forward), "__code__", None)
    return code.co_names if code is not None else ()


def foreign_forward(module: nn.Module) -> Callable[..., Any] | None:
    """Return the forward that was put onto a module in the place of its class's own; None where there is none.

    Accelerate's hooks run the forward that was there before them, and what torch.compile made runs what it was given.
    """
    return foreign_part(module, module.__dict__.get("forward"))


def foreign_part(module: nn.Module, found: Callable[..., Any] | None) -> Callable[..., Any] | None:
    """Return what `foreign_forward` returns where this is, or was, the module's instance-level forward."""
    if found is not None:
        found = before_hook(module, found)
    while hasattr(found, COMPILED):
        found = getattr(found, COMPILED)
    own = isinstance(found, MethodType) and found.__self__ is module and found.__func__ is type(module).forward
    return None if own else found


_LINEAR = nn.Linear.forward


def own_forward(module: nn.Module) -> Callable[..., Any]:
    """Return the forward of a module's class, bound."""
    if type(module) is nn.Linear and nn.Linear.forward is _LINEAR:
        return functools.partial(_linear, module)  # not a closure: a deep copy has to find its own module
    return MethodType(type(module).forward, module)


def gives_new_tensor(kind: type[nn.Module]) -> bool:
    """Return whether what this class's forward gives is always a new tensor, of which it keeps no hold.

    `F.linear` and `addmm` do not save their output for backward either.
    """
    if kind.forward is _LINEAR:
        return True
    return kind.__name__ == "Conv1D" and kind.__module__ == "transformers.pytorch_utils"


def _linear(module: nn.Linear, input: Tensor) -> Tensor:  # named as nn.Linear names it
    """Run nn.Linear's forward without `nn.Module.__getattr__`, which costs as much as dispatching the product.

    The parameters are looked up in every call where nn.Module keeps them, so a replaced one is seen; where another
    library keeps them elsewhere (pruning, parametrisations), the class's own forward finds them.
    """
    attributes = module.__dict__
    own = attributes["_parameters"]
    if "weight" in attributes or "bias" in attributes or "weight" not in own or "bias" not in own or _compiling():
        return type(module).forward(module, input)
    return F.linear(input, own["weight"], own["bias"])


_compiling = torch.compiler.is_compiling
