"""What is found by its file's name: the modules of a package, the packages in it, and the names that it gives."""

from __future__ import annotations

import pkgutil
import sys
from collections.abc import Callable, Mapping
from importlib import import_module
from types import ModuleType
from typing import Any


def modules_in(package: ModuleType) -> list[str]:
    """Return the own names of what lies in a package, sorted; nothing is imported."""
    return sorted(info.name for info in pkgutil.iter_modules(package.__path__))


def packages_in(package: ModuleType) -> list[str]:
    """Return the own names of the packages in a package, sorted; nothing is imported."""
    return sorted(info.name for info in pkgutil.iter_modules(package.__path__) if info.ispkg)


def given_by(package: str, home: Mapping[str, str]) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """Return `__getattr__` and `__dir__` of a package whose names load their module when they are first used.

    `home` has the module of each name, without the package's own.
    """
    known = sys.modules[package].__dict__

    def find(name: str) -> Any:
        if name not in home:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        value = known[name] = getattr(import_module(f"{package}.{home[name]}"), name)
        return value

    return find, lambda: sorted({*known, *home})
