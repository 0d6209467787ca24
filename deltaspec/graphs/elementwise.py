"""Activations: modules that compute each value from one value, proven by a trace of the module alone."""

from __future__ import annotations

import functools
import operator
from types import BuiltinFunctionType, FunctionType, MethodType
from typing import Any, Literal

import torch
from torch import fx, nn
from torch.nn import functional as F

from deltaspec.graphs.modes import unseen

Kind = Literal["simple", "compound"]
"""`simple`: one step of autograd, which keeps what entered. `compound`: several, which keep what lies between, too."""

_FUNCTIONS = frozenset(
    "abs add celu clamp clip cos div elu erf exp expm1 gelu hardsigmoid hardswish hardtanh leaky_relu log1p logsigmoid "
    "maximum minimum mish mul multiply neg pow relu relu6 rsqrt selu sigmoid silu sin softplus softsign sqrt square "
    "sub tanh tanhshrink true_divide truediv type_as where".split()
)
"""Names of functions and methods that compute each value by itself."""


def kind_of(module: nn.Module) -> Kind | None:
    """Return what kind of activation a module is; None where it is none that is known, or keeps what it gives."""
    if not is_elementwise(module):
        return None
    probe = torch.linspace(-2.0, 2.0, 8).requires_grad_()
    with torch.enable_grad(), unseen():
        node = type(module).forward(module, probe).grad_fn
    if node is None:
        return None
    if [getattr(following, "variable", None) is probe for following, _ in node.next_functions] != [True]:
        return "compound"
    return "simple" if [name for name in dir(node) if name.startswith("_raw_saved_")] == ["_raw_saved_self"] else None


def is_elementwise(module: nn.Module) -> bool:
    """Return whether each value that a module gives is known to be computed from one value."""
    if module._parameters or module._buffers or module._modules or isinstance(module, _NONE):
        return False
    facts = {n: _plain(value) for n, value in module.__dict__.items() if n not in _OF_MODULES and n[0] != "_"}
    if None in facts.values():
        return False
    key = (type(module), type(module).forward, *facts.items())
    if key not in _KNOWN:
        _KNOWN[key] = _traces(module)
    return _KNOWN[key]


def _plain(value: Any) -> Any:
    """Return what two equal values of an attribute have in common; None where a forward may find more in it."""
    if isinstance(value, functools.partial) and not value.args:
        return value.func, tuple(sorted(value.keywords.items())), "partial"
    if isinstance(value, MethodType):
        return value.__func__, "method"
    known = isinstance(value, bool | int | float | str | FunctionType | BuiltinFunctionType) or value is None
    return (type(value), value) if known else None


_NONE = (nn.Dropout, nn.Identity)
_OF_MODULES = frozenset((*nn.Module().__dict__, "forward"))
_NATIVE = torch._C._nn  # noqa: SLF001  # where the functions of torch.nn.functional that are not Python are
_KNOWN: dict[Any, bool] = {}


def _traces(module: nn.Module) -> bool:
    """Trace a module, and look whether all that it does is known."""
    try:
        graph = fx.Tracer().trace(module)
    except Exception:  # whatever a stranger's forward raises on proxies: it is none that is known
        return False
    inputs = [node for node in graph.nodes if node.op == "placeholder"]
    steps = [node for node in graph.nodes if node.op not in ("placeholder", "output")]
    result = next(node for node in graph.nodes if node.op == "output").args[0]
    if len(inputs) != 1 or not steps or result is not steps[-1]:
        return False
    return all(_is_known(node) for node in steps)


def _is_known(node: fx.Node) -> bool:
    if any(value is True for value in (*node.args, *node.kwargs.values())) or node.kwargs.get("out") is not None:
        return False
    if node.op == "call_method":
        return node.target in _FUNCTIONS
    name = getattr(node.target, "__name__", "")
    if node.op != "call_function" or name not in _FUNCTIONS:
        return False
    return any(getattr(place, name, None) is node.target for place in (torch, F, operator, _NATIVE))
