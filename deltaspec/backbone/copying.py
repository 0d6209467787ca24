"""Deep copies of modules in which nothing leads back to what was copied: functions and methods are bound to the copy.

`copy.deepcopy` leaves functions as they are, whatever stands in their closures, and what `torch.compile` made of a
method runs that method's own object.
"""

from __future__ import annotations

import copy
import weakref
from collections import OrderedDict
from collections.abc import Callable
from functools import cache, partial
from types import BuiltinFunctionType, CellType, FunctionType, MethodType
from typing import Any

import torch
from torch import fx, nn
from torch.utils.hooks import RemovableHandle

from deltaspec.backbone.holding import ATOMS, COMPILED, Reach, contents, copies_itself, parts_of, subtree
from deltaspec.backbone.weak import WeakCopies
from deltaspec.diagnostics.findings import DeltaSpecError, Diagnostic

_KNOWN_ATOMS = frozenset(ATOMS)
_EMPTY = frozenset((dict, OrderedDict, list, set))
PLAIN = _KNOWN_ATOMS | _EMPTY | {FunctionType}
"""Types of most attributes of modules: no tensors."""
_HOOKS = ("__deepcopy__", "__reduce__", "__reduce_ex__", "__getstate__", "__setstate__", "__copy__")
_LEFT_OUT = "_torchdynamo_disable"
_NONE: Any = object()
_COPIER = "deltaspec"
"""Key of a memo, whose others are identities, for what makes the whole copy."""


def deep_copy(module: nn.Module, memo: dict[Any, Any]) -> nn.Module:
    """Do what copy.deepcopy does, faster for plain modules, and bind to the copy what is bound to the module.

    A GraphModule's own `__deepcopy__` leaves out its hooks, its attributes and an overridden forward; here they stay.
    What `torch.compile` made of a module, or of its methods, is left out: the copy runs eagerly. Raises DeltaSpecError
    (DS430), naming module and attribute, where something cannot be copied, or stays bound to the original.
    """
    twin: nn.Module = copy_held(module, module, memo)
    return twin


def copy_held(value: Any, module: nn.Module, memo: dict[Any, Any]) -> Any:
    """Copy what a module holds, bound to the copy of the module that is being made, or that `memo` knows."""
    if (copier := memo.get(_COPIER)) is not None:  # this is part of a greater copy
        return copier.value(value)
    memo[_COPIER] = copier = _Copier(module, memo)
    try:
        twin = copier.value(value)
        copier.finish()
    finally:
        del memo[_COPIER]
    return twin


class _Copier(WeakCopies):
    """Copies one model, or what belongs to it."""

    def __init__(self, root: nn.Module, memo: dict[Any, Any]) -> None:
        super().__init__(Reach(subtree(root, memo), memo), memo)
        self._root = root
        self._made: set[int] = set()
        """Copies of modules."""
        self._place: list[tuple[nn.Module, str]] = []
        """Modules and attributes that are being copied."""

    def module(self, module: nn.Module) -> nn.Module:
        """Copy a module with all that is below it."""
        found: nn.Module | None = self._memo.get(id(module))
        if found is not None:
            return found
        kind: Any = type(module)
        traced = isinstance(module, fx.GraphModule)
        if not traced and not _is_plain(kind):
            self._place.append((module, ""))
            whole: nn.Module = self._opaque(module)
            self._place.pop()
            return whole
        twin: nn.Module = kind.__new__(kind)
        self._memo[id(module)] = twin
        self._made.add(id(twin))
        attributes = twin.__dict__
        for name, value in module.__dict__.items():
            form = type(value)
            if form in _KNOWN_ATOMS:
                attributes[name] = value
            elif name == "_compiled_call_impl" or (traced and name == "_graph"):
                continue  # what module.compile() made runs the module that it was made for
            elif form in _EMPTY and not value and id(value) not in self._memo:
                self._memo[id(value)] = attributes[name] = form()
            elif name == "_parameters" and form is dict:
                new = {key: None if one is None else copy.deepcopy(one, self._memo) for key, one in value.items()}
                self._memo[id(value)] = attributes[name] = new
            else:
                self._place.append((module, name))
                attributes[name] = self.value(value)
                self._place.pop()
        if isinstance(module, fx.GraphModule) and isinstance(twin, fx.GraphModule):
            twin.graph = copy.deepcopy(module.graph, self._memo)  # compiles it into the class, which is its own
        return twin

    def value(self, value: Any) -> Any:
        """Copy whatever a module, a container or a function holds."""
        form = type(value)
        if form in _KNOWN_ATOMS:
            return value
        if (found := self._memo.get(id(value), _NONE)) is not _NONE:
            return found
        if form in _PROXIES:
            return self.proxy(value)
        if isinstance(value, nn.Module):
            return self.module(value)
        if (way := _WAYS.get(form)) is not None:
            return way(self, value)
        return value if isinstance(value, ATOMS) else self._opaque(value)

    def _held(self, value: Any) -> Any:
        """Copy what a function holds if it leads to the model; what does not stays the user's own."""
        return self.value(value) if self._reach.leads_there(value) else value

    def function(self, function: FunctionType) -> Any:
        """Copy a function that leads to the model, with cells of its own; another is left as it is."""
        if not self._reach.leads_there(function):
            return function
        if (inner := function.__dict__.get(COMPILED)) is not None:
            eager: Any = self.value(inner)
            if function.__dict__.get(_LEFT_OUT):
                eager = torch.compiler.disable(eager)  # type: ignore[no-untyped-call]
            self._memo[id(function)] = eager
            return eager
        cells = tuple([self._cell(cell) for cell in function.__closure__ or ()])
        twin = FunctionType(function.__code__, function.__globals__, function.__name__, None, cells or None)
        self._memo[id(function)] = twin
        for cell, old in zip(cells, function.__closure__ or (), strict=True):
            if cell is not old and not contents(cell):
                cell.cell_contents = self.value(old.cell_contents)
        twin.__defaults__ = None if function.__defaults__ is None else tuple(map(self._held, function.__defaults__))
        keywords = function.__kwdefaults__
        twin.__kwdefaults__ = None if keywords is None else {key: self._held(one) for key, one in keywords.items()}
        twin.__dict__.update({key: self._held(one) for key, one in function.__dict__.items()})
        twin.__module__, twin.__qualname__, twin.__doc__ = function.__module__, function.__qualname__, function.__doc__
        twin.__annotations__ = function.__annotations__
        return twin

    def _cell(self, cell: CellType) -> CellType:
        """Return the cell of a copied closure: a new one for what leads to the model, which two closures may share."""
        if not any(map(self._reach.leads_there, contents(cell))):
            return cell
        twin: CellType = self._memo.setdefault(id(cell), CellType())
        return twin

    def method(self, method: MethodType) -> Any:
        """Copy a method, bound to the copy of its object."""
        return MethodType(self.value(method.__func__), self.value(method.__self__))

    def builtin(self, method: BuiltinFunctionType) -> Any:
        """Copy a method of a built-in kind, such as a list's."""
        if not self._reach.leads_there(method.__self__):
            return method
        return getattr(self.value(method.__self__), method.__name__)

    def partial_(self, value: partial[Any]) -> Any:
        """Copy a partial, which may lead back to itself."""
        twin = self._memo[id(value)] = partial(value.func)
        args, keywords = tuple(map(self.value, value.args)), {key: self.value(v) for key, v in value.keywords.items()}
        state: Any = (self.value(value.func), args, keywords, {key: self.value(v) for key, v in vars(value).items()})
        twin.__setstate__(state)  # type: ignore[attr-defined]  # typeshed leaves it out
        return twin

    def mapping(self, value: dict[Any, Any]) -> Any:
        """Copy a dictionary."""
        twin = self._memo[id(value)] = type(value)()
        for key, held in value.items():
            twin[self.value(key)] = self.value(held)
        return twin

    def list_(self, value: list[Any]) -> Any:
        """Copy a list."""
        twin = self._memo[id(value)] = list[Any]()
        twin.extend(map(self.value, value))
        return twin

    def tuple_(self, value: tuple[Any, ...]) -> Any:
        """Copy a tuple, unless nothing in it changes."""
        copied = tuple(map(self.value, value))
        if (found := self._memo.get(id(value), _NONE)) is not _NONE:  # it leads back to itself
            return found
        if all(new is old for new, old in zip(copied, value, strict=True)):
            return value
        self._memo[id(value)] = copied
        return copied

    def set_(self, value: set[Any]) -> Any:
        """Copy a set."""
        twin = self._memo[id(value)] = set[Any]()
        twin.update(map(self.value, value))
        return twin

    def _opaque(self, value: Any) -> Any:
        """Copy an object as its class says, with the functions in it bound to the copy."""
        if copies_itself(value):
            return copy.deepcopy(value, self._memo)
        bound = self._reach.leads_there(value)
        if bound:
            self._prepare(value)
        try:
            twin = copy.deepcopy(value, self._memo)
        except (TypeError, RuntimeError, AttributeError) as error:
            raise self._not_copied(str(error)) from error
        if isinstance(value, nn.Module):
            self._made.update(id(self._memo.get(id(module))) for module in value.modules())
        if bound and self._reach.leads_there(twin, self._made):
            raise self._not_copied(f"a copy of this {type(value).__name__} stays bound to the original")
        return twin

    def _prepare(self, value: Any) -> None:
        """Copy, ahead of an object that holds them, the functions and modules that its class would not copy so."""
        waiting, seen = [*parts_of(value)], {id(value)}
        while waiting:
            held = waiting.pop()
            if isinstance(held, ATOMS) or id(held) in seen or id(held) in self._memo:
                continue
            seen.add(id(held))
            if type(held) in _AHEAD or isinstance(held, nn.Module):
                self.value(held)
            elif not copies_itself(held):
                waiting += parts_of(held)

    def _not_copied(self, reason: str) -> DeltaSpecError:
        module, name = self._place[-1]
        fqn = next((fqn for fqn, other in self._root.named_modules() if other is module), "")
        place = ".".join(part for part in (fqn, name) if part)
        return not_copied(self._root, f"{place}: {reason}" if place else reason)


_WAYS: dict[type, Callable[[_Copier, Any], Any]] = {
    FunctionType: _Copier.function, MethodType: _Copier.method, BuiltinFunctionType: _Copier.builtin,
    partial: _Copier.partial_, dict: _Copier.mapping, OrderedDict: _Copier.mapping, list: _Copier.list_,
    tuple: _Copier.tuple_, set: _Copier.set_, weakref.ref: _Copier.reference, RemovableHandle: _Copier.handle,
}  # fmt: skip
_PROXIES = (weakref.ProxyType, weakref.CallableProxyType)
_AHEAD = frozenset((FunctionType, BuiltinFunctionType, weakref.ref, RemovableHandle))
"""Types that copy.deepcopy takes for atoms, or copies without what they lead to."""


def not_copied(model: nn.Module, reason: str) -> DeltaSpecError:
    """Return the error for a model that cannot be copied."""
    hint = "build the model anew, or remove what cannot be copied (a lock, a stream, a cached result) before compiling"
    return DeltaSpecError([Diagnostic("DS430", f"{type(model).__name__} cannot be copied: {reason}", suggestion=hint)])


@cache
def _is_plain(kind: Any) -> bool:
    """Return whether a class leaves copying and pickling to nn.Module, and has no slots of its own."""
    plain = all(getattr(kind, hook, None) is getattr(nn.Module, hook, None) for hook in _HOOKS)
    return plain and not any("__slots__" in base.__dict__ for base in kind.__mro__[:-1])
