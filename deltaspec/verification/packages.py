"""Packages of other libraries, which are loaded when answers are compared with theirs."""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from typing import Any

from deltaspec.diagnostics.findings import DeltaSpecError, Diagnostic


def loaded(extra: str, *names: str) -> Any:
    """Import packages and return the first. Raises DeltaSpecError (DS553) that names those that are not installed."""
    missing = [name for name in names if find_spec(name) is None]
    if missing:
        message = f"comparing with {extra} needs {', '.join(missing)}, which is not installed"
        raise DeltaSpecError([Diagnostic("DS553", message, suggestion=f"pip install 'deltaspec[{extra}]'")])
    return import_module(names[0])
