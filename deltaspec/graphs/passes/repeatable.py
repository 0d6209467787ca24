"""Steps of a formula that may not run again: those that draw random numbers by themselves, or write into tensors."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx


def is_unrepeatable(node: fx.Node) -> bool:
    """Return whether a node draws or writes. A formula's own dropouts do not: they are inputs, and keep their masks."""
    if node.op == "call_method":
        name = str(node.target)
        return name.endswith("_") or _draws(name) or _takes_place(getattr(Tensor, name, None), node)
    if node.op != "call_function":
        return False
    name = getattr(node.target, "__name__", "")
    if name == "_one":  # what a dropout draws of it depends on a probe
        return True
    writes = name in _WRITING or (name.endswith("_") and not name.endswith("__"))
    return writes or _takes_place(node.target, node) or any(map(_draws, (name, *_names_in(node.target))))


def _takes_place(function: Any, node: fx.Node) -> bool:
    """Return whether a call says that a tensor is to be overwritten."""
    if node.kwargs.get("inplace") or node.kwargs.get("out") is not None:
        return True
    code = getattr(function, "__code__", None)
    names = () if code is None else code.co_varnames[: code.co_argcount]
    place = names.index("inplace") if "inplace" in names else len(node.args)
    return place < len(node.args) and bool(node.args[place])


def _names_in(function: Callable[..., Any] | str) -> tuple[str, ...]:
    """Return the names that a function of Python looks up."""
    code = getattr(function, "__code__", None)
    return () if code is None else code.co_names


@functools.cache
def _draws(name: str) -> bool:
    """Return whether an operator of this name draws random numbers, as torch itself says."""
    packet = getattr(torch.ops.aten, name, None) if name.isidentifier() and name[0] != "_" else None
    overloads: Any = getattr(packet, "overloads", tuple)
    return any(torch.Tag.nondeterministic_seeded in getattr(packet, each).tags for each in overloads())


_WRITING = frozenset(
    "iadd iand iconcat ifloordiv ilshift imatmul imod imul ior ipow irshift isub itruediv ixor setitem delitem".split()
)
"""Names of functions of `operator` that write."""
