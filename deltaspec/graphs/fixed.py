"""What a trace fixes of modules besides their code: the values of attributes that are no tensors or modules."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

from torch import Tensor, fx, nn

from deltaspec.diagnostics.findings import DeltaSpecError, Diagnostic
from deltaspec.names.paths import below

Fixed = dict[tuple[str, str], Any]
"""Values of attributes when they were traced, by the module's FQN and the attribute's name."""

_OF_MODULES = frozenset((*dir(nn.Module), *nn.Module().__dict__))
_COMPARED = (bool, int, float, complex, str, bytes, type(None), list, tuple, dict, set, frozenset)
_FIXED: WeakKeyDictionary[fx.Graph, Fixed] = WeakKeyDictionary()


@contextmanager
def noting(model: nn.Module) -> Iterator[Fixed]:
    """Note, in a model that is traced inside, which attributes its forwards read that are no tensors or modules."""
    noted: Fixed = {}
    kinds = []
    for fqn, module in model.named_modules():
        if not type(module).__module__.startswith("torch."):
            kinds.append((module, type(module)))
            module.__class__ = _noting(type(module), fqn, noted)
    try:
        yield noted
    finally:
        for module, kind in kinds:
            module.__class__ = kind


def _noting(kind: Any, fqn: str, noted: Fixed) -> Any:
    def read(self: Any, name: str) -> Any:
        value = kind.__getattribute__(self, name)
        if name not in _OF_MODULES and not name.startswith("__") and _is_data(self, name, value):
            noted.setdefault((fqn, name), copy.deepcopy(value) if isinstance(value, _COMPARED) else value)
        return value

    own = {"__getattribute__": read, "__module__": kind.__module__, "__qualname__": kind.__qualname__}
    return type(kind.__name__, (kind,), own)


def _is_data(module: Any, name: str, value: Any) -> bool:
    if isinstance(value, Tensor | nn.Module | fx.Proxy | type):
        return False
    return not callable(value) or name in object.__getattribute__(module, "__dict__")


def keep(graph: fx.Graph, fixed: Fixed) -> None:
    """Remember what a graph fixes."""
    if fixed:
        _FIXED[graph] = fixed


def copied(graph: fx.Graph, new: fx.Graph) -> fx.Graph:
    """Remember that a copy of a graph fixes what that does."""
    keep(new, _FIXED.get(graph, {}))
    return new


def fixed_in(graph: fx.Graph | None) -> list[str]:
    """Return the full names of the attributes that a graph fixes."""
    return [] if graph is None else [below(fqn, name) for fqn, name in _FIXED.get(graph, {})]


def refusing_changes(graph: fx.Graph, function: Callable[..., Any]) -> Callable[..., Any]:
    """Return the function of a graph that raises DeltaSpecError (DS469) where an attribute has another value now."""
    fixed = [(*place, value) for place, value in _FIXED.get(graph, {}).items() if _is_comparable(value)]
    if not fixed:
        return function

    def run(backbone: nn.Module, *args: Any, **kwargs: Any) -> Any:
        for fqn, name, value in fixed:
            if (now := getattr(backbone.get_submodule(fqn), name, None)) != value:
                raise DeltaSpecError([_changed(below(fqn, name), value, now)])
        return function(backbone, *args, **kwargs)

    return run


def _is_comparable(value: Any) -> bool:
    return callable(value) or isinstance(value, _COMPARED)


def _changed(name: str, before: Any, now: Any) -> Diagnostic:
    message = (
        f"{name} was {before!r} when the model was captured as symbolic, and is {now!r}: the trace does not see it"
    )
    hint = 'compile with capture="modules" (or "auto"), which runs the model\'s own code, or put the value back'
    return Diagnostic("DS469", message, suggestion=hint)
