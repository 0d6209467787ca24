"""A delta compiler: specs of LoRA, adapters and other deltas, compiled reversibly onto PyTorch models.

Importing this package imports no torch: each public name loads its module when it is first used.
"""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from deltaspec.compiled import CompiledModel as CompiledModel
    from deltaspec.compiler import compile as compile
    from deltaspec.diagnostics import DeltaSpecError as DeltaSpecError
    from deltaspec.diagnostics import Diagnostic as Diagnostic
    from deltaspec.plan import plan as plan
    from deltaspec.planning.planned import Plan as Plan
    from deltaspec.spec import DeltaSpec as DeltaSpec
    from deltaspec.spec import load as load
    from deltaspec.store import restore as restore
    from deltaspec.validation import validate as validate

_HOME = {
    "CompiledModel": "compiled",
    "DeltaSpec": "spec",
    "DeltaSpecError": "diagnostics",
    "Diagnostic": "diagnostics",
    "Plan": "planning.planned",
    "compile": "compiler",
    "load": "spec",
    "plan": "plan",
    "restore": "store",
    "validate": "validation",
}
__all__ = sorted(_HOME)


class _Package(ModuleType):
    """Keeps a public name from being hidden by the module of the same name, which importing would put in its place."""

    def __setattr__(self, name: str, value: object) -> None:
        if not (name in _HOME and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import PackageNotFoundError, version

        try:
            return version(__name__)
        except PackageNotFoundError:
            return "unknown (not installed)"
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        value = getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in ("torch", "safetensors"):
            raise
        message = f"deltaspec.{name} needs {error.name}: pip install 'deltaspec[torch]'"
        raise ModuleNotFoundError(message, name=error.name) from None
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME})
