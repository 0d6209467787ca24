"""A delta compiler: specs of LoRA, adapters and other deltas, compiled reversibly onto PyTorch models.

Importing this package imports no torch: each public name loads its module when it is first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from deltaspec.compiler.compile import compile as compile
    from deltaspec.compiler.compiled import CompiledModel as CompiledModel
    from deltaspec.compiler.estimate import estimate as estimate
    from deltaspec.compiler.estimate import plan as plan
    from deltaspec.compiler.restore import restore as restore
    from deltaspec.diagnostics.findings import DeltaSpecError as DeltaSpecError
    from deltaspec.diagnostics.findings import Diagnostic as Diagnostic
    from deltaspec.language.load import load as load
    from deltaspec.language.model import DeltaSpec as DeltaSpec
    from deltaspec.language.validate import validate as validate
    from deltaspec.planning.plan import Plan as Plan

_HOME = {
    "CompiledModel": "compiler.compiled",
    "DeltaSpec": "language.model",
    "DeltaSpecError": "diagnostics.findings",
    "Diagnostic": "diagnostics.findings",
    "Plan": "planning.plan",
    "compile": "compiler.compile",
    "estimate": "compiler.estimate",
    "load": "language.load",
    "plan": "compiler.estimate",
    "restore": "compiler.restore",
    "validate": "language.validate",
}
__all__ = sorted(_HOME)


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
