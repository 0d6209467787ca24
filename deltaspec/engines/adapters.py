"""Adapters as engines find them: a configuration of PEFT, and the names, shapes and dtypes of tensors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from deltaspec.diagnostics.findings import DeltaSpecError
from deltaspec.documents.document import Document, read
from deltaspec.engines.keys import LORA, Key, parsed
from deltaspec.formats.opening import CONFIG, no_adapter, refuse_no_adapter
from deltaspec.formats.peft.reader import known_types
from deltaspec.formats.unread import Header, Unread

_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin", "adapter_model.pt")


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
    """Read a directory of PEFT, headers of tensors alone. Raises DeltaSpecError in the words of `restore`."""
    refuse_no_adapter(folder)
    if not (folder / CONFIG).is_file():
        raise no_adapter(folder)
    unread, config = Unread(folder), read(folder / CONFIG)
    kind = config.data.get("peft_type")
    if kind is not None and not isinstance(kind, str):
        unread.unknown("peft_type", kind, known_types(), CONFIG)
        unread.settle()
    if kind is None and "r" not in config.data:
        message = "this is no configuration of PEFT: it names no peft_type"
        hint = "of another library? deltaspec convert DIRECTORY -o OUT, and check OUT"
        raise DeltaSpecError([config.diagnostic("DS625", message, (), hint)])
    file = next((name for name in _WEIGHTS if (folder / name).is_file()), None)
    if file is None:
        unread.find("DS521", f"has no {_WEIGHTS[0]}", "save the adapter again")
        raise DeltaSpecError(unread.findings)
    return Adapter(config, unread.headers(file), str(folder / file), folder)
