"""Adapters as engines find them: a configuration of PEFT, and the names, shapes and dtypes of tensors."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, NoReturn

from deltaspec.diagnostics.findings import DeltaSpecError, Diagnostic
from deltaspec.documents.document import Document, read
from deltaspec.engines.keys import LORA, Key, parsed

CONFIG = "adapter_config.json"
_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin", "adapter_model.pt")
_WAYS = "give the directory that c.save(dir) or PEFT's save_pretrained wrote"


@dataclass(frozen=True, slots=True)
class Header:
    """What a file says of a tensor before its values."""

    shape: tuple[int, ...]
    dtype: str
    """As safetensors calls it: `F32`, `BF16`."""


@dataclass(frozen=True, eq=False)
class Adapter:
    """One adapter in PEFT's form, without values."""

    config: Document
    """What adapter_config.json holds."""
    tensors: Mapping[str, Header]
    file: str
    """The file of the tensors, as findings name it."""
    folder: Path
    delta: str = ""
    """Name of the delta that it was made of, where it comes out of a saved set."""
    ours: str = ""
    """Its method, as it is called here."""
    places: tuple[str, ...] = ()
    """Where that delta works."""

    @property
    def data(self) -> dict[str, Any]:
        """Keys and values of the configuration."""
        return self.config.data

    @cached_property
    def method(self) -> str:
        """PEFT's name of the method; empty where the configuration names none."""
        kind = self.data.get("peft_type")
        return kind if isinstance(kind, str) else ""

    @cached_property
    def keys(self) -> tuple[Key, ...]:
        """Names of the tensors, taken apart, in the order of the file."""
        return tuple(parsed(name) for name in self.tensors)

    @cached_property
    def is_lora(self) -> bool:
        """Whether its configuration or its tensors are those of LoRA."""
        return self.method == "LORA" or any(key.part in LORA for key in self.keys)


def read_peft(folder: Path) -> Adapter:
    """Read a directory of PEFT, headers of tensors alone. Raises DeltaSpecError where it is none (DS625)."""
    _refuse_others(folder)
    config = read(folder / CONFIG)
    kind = config.data.get("peft_type")
    if kind is not None and not isinstance(kind, str):
        raise DeltaSpecError([config.diagnostic("DS625", "peft_type must be text", ("peft_type",), _WAYS)])
    if kind is None and "r" not in config.data:
        message = "this is no configuration of PEFT: it names no peft_type"
        raise DeltaSpecError([config.diagnostic("DS625", message, (), _WAYS)])
    file = next((folder / name for name in _WEIGHTS if (folder / name).is_file()), None)
    if file is None:
        _fail(folder, f"there are no weights here: none of {', '.join(_WEIGHTS)}")
    return Adapter(config, headers(file), str(file), folder)


def _refuse_others(folder: Path) -> None:
    if not folder.is_dir():
        _fail(folder, "is no directory" if folder.exists() else "there is no such directory")
    if (folder / CONFIG).is_file():
        return
    below = sorted(entry.name for entry in os.scandir(folder) if (Path(entry.path) / CONFIG).is_file())
    hint = f"adapters lie in folders of their own here, name one: {', '.join(below[:8])}" if below else _WAYS
    _fail(folder, f"there is neither a manifest.json nor an {CONFIG} here", hint)


def headers(file: Path) -> dict[str, Header]:
    """Return what a file of weights says of its tensors. Raises DeltaSpecError (DS625); nothing in it is run."""
    return _safetensors(file) if file.suffix == ".safetensors" else _pickled(file)


def _safetensors(file: Path) -> dict[str, Header]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="pt") as opened:
            slices = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118  it is no mapping
            return {name: Header(tuple(found.get_shape()), found.get_dtype()) for name, found in slices.items()}
    except (SafetensorError, OSError) as error:
        _fail(file, f"is no safetensors file: {error}", "save the adapter again")


def _pickled(file: Path) -> dict[str, Header]:
    import torch

    try:
        loaded = torch.load(file, map_location="meta", weights_only=True)
    except (OSError, RuntimeError, EOFError, ValueError, KeyError, UnpicklingError) as error:
        said = str(error).strip().partition("\n")[0] or type(error).__name__
        _fail(file, f"cannot be read as tensors alone: {said}", "save the adapter again, as safetensors")
    if not isinstance(loaded, dict) or not all(isinstance(value, torch.Tensor) for value in loaded.values()):
        _fail(file, "holds something else than named tensors", "save the adapter again, as safetensors")
    return {str(name): Header(tuple(value.shape), _DTYPES.get(str(value.dtype), "?")) for name, value in loaded.items()}


_DTYPES = {
    "torch.float64": "F64", "torch.float32": "F32", "torch.float16": "F16", "torch.bfloat16": "BF16",
    "torch.float8_e4m3fn": "F8_E4M3", "torch.float8_e5m2": "F8_E5M2", "torch.int64": "I64", "torch.int32": "I32",
    "torch.int16": "I16", "torch.int8": "I8", "torch.uint8": "U8", "torch.bool": "BOOL",
}  # fmt: skip


def _fail(place: Path, message: str, hint: str = _WAYS) -> NoReturn:
    raise DeltaSpecError([Diagnostic("DS625", message, str(place), suggestion=hint)]) from None
