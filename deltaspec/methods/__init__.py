"""The methods, found by themselves: every module of this package that does not start with `_`,
and every object that another package registers under the entry-point group `deltaspec.methods`.
"""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from functools import cache
from importlib.metadata import entry_points

from deltaspec.methods._base import Method

GROUP = "deltaspec.methods"


@cache
def builtin_methods() -> dict[str, Method]:
    """Give deltaspec's own methods by name, sorted."""
    found: dict[str, Method] = {}
    for module_info in pkgutil.iter_modules(__path__):
        if module_info.name.startswith("_"):
            continue
        module = importlib.import_module(f"{__name__}.{module_info.name}")
        for _, kind in inspect.getmembers(module, inspect.isclass):
            if issubclass(kind, Method) and kind.__module__ == module.__name__:
                found[kind.name] = kind()
    return dict(sorted(found.items()))


@cache
def methods() -> dict[str, Method]:
    """Give all methods by name, those of other installed packages included.

    Raises ValueError where a plug-in takes a name that is taken or registers something else than a Method.
    """
    found = dict(builtin_methods())
    for entry in entry_points(group=GROUP):
        kind = entry.load()
        if not (inspect.isclass(kind) and issubclass(kind, Method)):
            raise ValueError(f"entry point {entry.name!r} of {GROUP} is {kind!r}, not a subclass of Method")
        if kind.name in found:
            raise ValueError(f"entry point {entry.name!r} of {GROUP}: the method name {kind.name!r} is taken")
        found[kind.name] = kind()
    return dict(sorted(found.items()))
