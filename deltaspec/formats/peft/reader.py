"""Reading a PEFT directory."""

from __future__ import annotations

from functools import cache
from importlib import import_module
from pathlib import Path
from types import ModuleType

from deltaspec.backbone.loading import Wanted
from deltaspec.formats.base import Base
from deltaspec.formats.incoming import Incoming
from deltaspec.formats.peft import types
from deltaspec.formats.peft.adapter import CONFIG, WEIGHTS, Adapter
from deltaspec.formats.peft.base_model import base_named_in
from deltaspec.formats.peft.beside import read_beside
from deltaspec.formats.unread import is_pipe
from deltaspec.names.packages import modules_in
from deltaspec.names.patterns import PatternError

FILES = (CONFIG, *WEIGHTS)
_MOST_HEADER = 100_000_000
"""Bytes that safetensors allows for the list of tensors in a file."""


def recognises(folder: Path) -> bool:
    """Return whether a directory holds a PEFT adapter; AdapterHub's has a configuration of the same name."""
    path = folder / CONFIG
    return path.is_file() and b'"peft_type"' in path.read_bytes()


@cache
def known_types() -> tuple[str, ...]:
    """Return the PEFT types that can be read, in upper case."""
    return tuple(name.upper() for name in modules_in(types))


def type_module(name: str) -> ModuleType:
    """Return the module of a known PEFT type."""
    return import_module(f"{types.__name__}.{name.lower()}")


def base_of(folder: Path) -> tuple[str | None, Wanted]:
    """Return the base model that an adapter names, and of which class it is to be for the adapter's task."""
    return base_named_in(folder)


def signature(folder: Path) -> bytes | None:
    """Return an adapter's configuration and the list of its tensors, as they lie on disk."""
    if is_pipe(folder / WEIGHTS[0]):
        return None
    try:
        with (folder / WEIGHTS[0]).open("rb") as file:
            length = file.read(8)
            header = file.read(min(int.from_bytes(length, "little"), _MOST_HEADER))
        return (folder / CONFIG).read_bytes() + b"\0" + length + header
    except OSError:  # which reading it says better
        return None


def read(folder: Path, base: Base, name: str) -> Incoming:
    """Read a PEFT adapter for a base model. Raises DeltaSpecError with all findings."""
    adapter = Adapter(folder, base, name)
    if adapter.type not in known_types():
        adapter.unknown("peft_type", adapter.config.get("peft_type"), known_types(), CONFIG)
        adapter.settle()
    adapter.load(WEIGHTS)
    adapter.incoming.kind = f"PEFT {adapter.type.lower()}"
    try:
        beside = read_beside(adapter)
        type_module(adapter.type).read(adapter)
        beside()
    except PatternError as error:
        adapter.find("DS544", f"the expression {error}", error.suggestion or "name the modules in a list", CONFIG)
    return adapter.finish()
