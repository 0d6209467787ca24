"""What values hold: whether something that a module keeps leads, through whatever holds it, to a model's own parts."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Iterable, Iterator
from functools import partial
from types import BuiltinFunctionType, CellType, CodeType, FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn

ATOMS = (bool, int, float, complex, str, bytes, type(None), type, torch.dtype, torch.device, torch.Size)
"""Kinds of values that are their own copies, and hold nothing."""
_CLOSED = (*ATOMS, Tensor, ModuleType, CodeType, logging.Logger, torch.Generator)
_CONTAINERS = (list, tuple, set, frozenset, deque)
_OWN = __name__.partition(".")[0] + "."
COMPILED = "_torchdynamo_orig_callable"
"""Attribute under which what torch.compile made of a function has that function."""


def copies_itself(value: Any) -> bool:
    """Return whether a value is of a class of this package that knows how it is copied together with a model."""
    return type(value).__module__.startswith(_OWN) and hasattr(value, "__deepcopy__")


def contents(cell: CellType) -> tuple[Any, ...]:
    """Return what a cell of a closure holds; nothing where nothing was assigned yet."""
    try:
        return (cell.cell_contents,)
    except ValueError:
        return ()


def codes_in(code: CodeType) -> Iterator[CodeType]:
    """Yield a function's code, and those of the functions that are made in it."""
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from codes_in(constant)


def parts_of(value: Any) -> Iterator[Any]:
    """Yield what a value holds directly: a function in its closure, defaults and attributes, a method its object."""
    if isinstance(value, _CLOSED):
        return
    if isinstance(value, FunctionType):
        if COMPILED in value.__dict__:
            yield value.__dict__[COMPILED]
            return
        for cell in value.__closure__ or ():
            yield from contents(cell)
        yield from value.__defaults__ or ()
        yield from (value.__kwdefaults__ or {}).values()
    elif isinstance(value, partial):
        yield from (value.func, *value.args, *value.keywords.values())
    elif isinstance(value, MethodType):
        yield from (value.__self__, value.__func__)
        return
    elif isinstance(value, BuiltinFunctionType):
        yield value.__self__
        return
    elif isinstance(value, dict):
        yield from (*value.keys(), *value.values())
    elif isinstance(value, _CONTAINERS):
        yield from value
    else:
        for name in {name for kind in type(value).__mro__ for name in _slots(kind)}:
            if (held := getattr(value, name, None)) is not None:
                yield held
    yield from getattr(value, "__dict__", {}).values()


def _slots(kind: type) -> tuple[str, ...]:
    slots: Any = kind.__dict__.get("__slots__", ())
    names: tuple[str, ...] = (slots,) if isinstance(slots, str) else tuple(slots)
    return tuple(name for name in names if not name.startswith("__"))


def subtree(root: nn.Module, replaced: dict[int, Any]) -> list[nn.Module]:
    """Return the modules of a model, without those of these ids and what they alone hold: thousands of deltas, say."""
    found: dict[int, nn.Module] = {}
    waiting = [root]
    while waiting:
        module = waiting.pop()
        if id(module) not in found and id(module) not in replaced:
            found[id(module)] = module
            waiting += module.children()
    return list(found.values())


class Reach:
    """Tells whether values lead to parts of a model: its modules, parameters and buffers, by identity."""

    def __init__(self, modules: Iterable[nn.Module], memo: dict[Any, Any]) -> None:
        """Take what `memo` replaces for part of the model; what it keeps as it is leads to no part."""
        modules = list(modules)
        self._free: dict[int, Any] = {key: kept for key, kept in memo.items() if key == id(kept)}
        """What leads to no part of the model, of what was looked through."""
        self.own = {*(memo.keys() - self._free.keys()), *map(id, modules)}
        """Identities of the model's parts."""
        for module in modules:
            tensors = (*module._parameters.values(), *module._buffers.values())
            self.own.update(id(tensor) for tensor in tensors if tensor is not None)

    def leads_there(self, value: Any, stop: set[int] | None = None) -> bool:
        """Return whether a value is part of the model or leads to one; not through what is in `stop`."""
        waiting, seen = [value], dict[int, Any]()
        while waiting:
            held = waiting.pop()
            if isinstance(held, ATOMS) or id(held) in seen or id(held) in self._free:
                continue
            if stop is not None and (id(held) in stop or copies_itself(held)):
                continue
            if id(held) in self.own or copies_itself(held):
                return True
            seen[id(held)] = held
            waiting += parts_of(held)
        if stop is None:
            self._free |= seen
        return False
