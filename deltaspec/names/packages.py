"""What is found by its file's name: the modules of a package, and the packages in it."""

from __future__ import annotations

import pkgutil
from types import ModuleType


def modules_in(package: ModuleType) -> list[str]:
    """Return the own names of what lies in a package, sorted; nothing is imported."""
    return sorted(info.name for info in pkgutil.iter_modules(package.__path__))


def packages_in(package: ModuleType) -> list[str]:
    """Return the own names of the packages in a package, sorted; nothing is imported."""
    return sorted(info.name for info in pkgutil.iter_modules(package.__path__) if info.ispkg)
