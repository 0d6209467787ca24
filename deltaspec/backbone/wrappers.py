"""Wrappers that other libraries put around a forward: whether one leads to another callable."""

from __future__ import annotations

import functools
from types import CodeType, FunctionType, MethodType
from typing import Any

from torch import nn

from deltaspec.backbone.holding import codes_in, parts_of

_MOST = 300
"""Objects that are looked at, at most."""


def reaches(top: Any, wanted: Any, module: nn.Module) -> bool:
    """Return whether a callable holds another: in its closure, defaults, arguments or attributes, or by a name that its
    code uses on the module it is for (`module._old_forward`).
    """
    waiting, seen, names, on_module = [top], set[int](), set[str](), False
    while len(seen) < _MOST:
        if not waiting and on_module:
            # Of the module only what the code names: accelerate leaves its `_old_forward` there for whoever comes next.
            found = [module.__dict__[name] for name in names if name != "forward" and name in module.__dict__]
            waiting = [value for value in found if id(value) not in seen]
        if not waiting:
            return False
        one = waiting.pop()
        if one is wanted:
            return True
        if id(one) in seen:
            continue
        seen.add(id(one))
        if one is module:
            on_module = True
        elif isinstance(one, FunctionType):
            names |= _names_in(one.__code__)
        waiting += _held_by(one)
    return False


def _held_by(one: Any) -> list[Any]:
    """Return what a callable, or a list of some, holds and may call."""
    if isinstance(one, nn.Module | type):
        return []
    if isinstance(one, FunctionType | MethodType | functools.partial | tuple | list):
        return list(parts_of(one))
    return [part for part in parts_of(one) if callable(part)]


def _names_in(code: CodeType) -> set[str]:
    """Return the names that code uses: looked up, or as texts, for `getattr`."""
    texts = {text for inner in codes_in(code) for text in inner.co_consts if isinstance(text, str)}
    return texts.union(*(inner.co_names for inner in codes_in(code)))
