"""Directories that hold something else: a model's folder, or another library's adapter, is no place for ours."""

from __future__ import annotations

import os
from os import PathLike
from pathlib import Path

from deltaspec.diagnostics.findings import DeltaSpecError, Diagnostic

_MODEL = ("model*.safetensors", "model*.safetensors.index.json", "pytorch_model*.bin", "pytorch_model*.bin.index.json")
_ADAPTER = ("adapter_config.json", "adapter_setup.json")


def refuse_occupied(folder: Path, *, adapters: bool = True) -> None:
    """Raise DeltaSpecError (DS562) where a directory holds a model; with `adapters`, or another library's adapter.

    Who loads that model from there would get what is written beside it, too.
    """
    if not folder.is_dir():
        return
    held = None
    if any(path.is_file() for pattern in _MODEL for path in folder.glob(pattern)):
        held = "the weights of a model"
    elif adapters and any((folder / name).is_file() for name in _ADAPTER):
        held = "an adapter of another library"
    if held is not None:
        finding = Diagnostic("DS562", f"holds {held}", file=str(folder), suggestion="give another directory")
        raise DeltaSpecError([finding])


def refuse_inside(out: Path, *sources: str | PathLike[str]) -> None:
    """Raise DeltaSpecError (DS590) where a directory is read, or lies in one that is: that stays as it is."""
    place = Path(os.path.realpath(out))
    held = [str(source) for source in sources if place.is_relative_to(os.path.realpath(source))]
    if held:
        message = f"lies in {held[0]}, which is read" if place != Path(os.path.realpath(held[0])) else "is what is read"
        finding = Diagnostic("DS590", message, file=str(out), suggestion="give a directory outside of it")
        raise DeltaSpecError([finding])
