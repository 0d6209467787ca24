"""The methods, found by themselves: one a module of `builtin`, named after it, and every class that another package
registers under the entry-point group `deltaspec.methods`.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Iterator, Mapping
from functools import cache
from typing import TYPE_CHECKING

from deltaspec.methods import builtin
from deltaspec.names.packages import modules_in

if TYPE_CHECKING:
    from deltaspec.methods.base import Method

GROUP = "deltaspec.methods"


class _Own(Mapping[str, "Method"]):
    """deltaspec's own methods, each imported when it is first asked for: a spec uses few of them."""

    def __init__(self) -> None:
        self._names = modules_in(builtin)
        self._found: dict[str, Method] = {}

    def __getitem__(self, name: str) -> Method:
        if name not in self._found:
            if name not in self._names:
                raise KeyError(name)
            from deltaspec.methods.base import Method  # with pydantic, which names alone do not need

            module = importlib.import_module(f"{builtin.__name__}.{name}")
            kinds = [kind for kind in vars(module).values() if inspect.isclass(kind) and issubclass(kind, Method)]
            [kind] = [kind for kind in kinds if kind.__module__ == module.__name__]
            wrong = f"methods/builtin/{name}.py defines the method {kind.name!r}; name the file after it"
            assert kind.name == name, wrong
            self._found[name] = kind()
        return self._found[name]

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


@cache
def builtin_methods() -> Mapping[str, Method]:
    """Return deltaspec's own methods by name, sorted."""
    return _Own()


@cache
def methods() -> Mapping[str, Method]:
    """Return all methods by name, those of other installed packages included.

    Raises ValueError where a plug-in takes a name that is taken or registers something else than a Method.
    """
    from importlib.metadata import entry_points  # slow to import, and a spec of deltaspec's own methods needs none

    from deltaspec.methods.base import Method

    own, others = builtin_methods(), {}
    for entry in entry_points(group=GROUP):
        kind = entry.load()
        if not (inspect.isclass(kind) and issubclass(kind, Method)):
            raise ValueError(f"entry point {entry.name!r} of {GROUP} is {kind!r}, not a subclass of Method")
        if kind.name in own or kind.name in others:
            raise ValueError(f"entry point {entry.name!r} of {GROUP}: the method name {kind.name!r} is taken")
        others[kind.name] = kind()
    return dict(sorted({**own, **others}.items())) if others else own
