"""Reading an AdapterHub directory: one adapter, or a setup of several."""

from __future__ import annotations

from functools import cache
from importlib import import_module
from pathlib import Path
from types import ModuleType

from deltaspec.backbone.loading import Wanted
from deltaspec.diagnostics.findings import DeltaSpecError
from deltaspec.formats.adapterhub import architectures, heads
from deltaspec.formats.adapterhub.adapter import CONFIG, WEIGHTS, Adapter
from deltaspec.formats.adapterhub.configuration import BOTTLENECK
from deltaspec.formats.adapterhub.heads import read_head
from deltaspec.formats.adapterhub.setups import SETUP, read_setup
from deltaspec.formats.base import Base
from deltaspec.formats.incoming import Incoming
from deltaspec.formats.options import Options
from deltaspec.formats.unread import Unread
from deltaspec.names.packages import modules_in

_HERE = (CONFIG, *WEIGHTS, heads.CONFIG, *heads.WEIGHTS)
FILES = (*_HERE, SETUP, *(f"*/{file}" for file in _HERE), "*/adapter_fusion_config.json",
         "*/pytorch_model_adapter_fusion.bin")  # fmt: skip

_FLEXIBLE = ("AdapterModel", "ModelWithHeads")
"""Ends of the names of AdapterHub's own classes, with flexible heads."""


def recognises(folder: Path) -> bool:
    """Return whether a directory holds an AdapterHub adapter or setup; PEFT's has a configuration of the same name."""
    if (folder / SETUP).is_file():
        return True
    path = folder / CONFIG
    return path.is_file() and b'"config"' in (content := path.read_bytes()) and b'"peft_type"' not in content


def base_of(folder: Path) -> tuple[str | None, Wanted]:
    """Return the base model that an adapter, or the first of a setup, names, and of which class it is to be."""
    if (folder / SETUP).is_file():
        inside = sorted(path.parent for path in folder.glob(f"*/{CONFIG}"))
        return base_of(inside[0]) if inside else (None, Wanted())
    unread = Unread(folder)
    config = unread.json(CONFIG)
    head = unread.json(heads.CONFIG) if (folder / heads.CONFIG).is_file() else {}
    name, kind, labels = config.get("model_name"), config.get("model_class"), head.get("num_labels")
    if not isinstance(kind, str) or kind.endswith(_FLEXIBLE):
        kind, labels = heads.class_of(unread, head)
    settings = {"num_labels": labels} if isinstance(labels, int) and kind is not None else {}
    return name if isinstance(name, str) and name else None, Wanted(kind, settings)


def signature(folder: Path) -> bytes | None:
    """Return None: what an adapter comes to depends on the values in its files."""
    return None


@cache
def known_architectures() -> dict[str, ModuleType]:
    """Return the modules of the architectures that can be read, by name."""
    return {name: import_module(f"{architectures.__name__}.{name}") for name in modules_in(architectures)}


def read(folder: Path, base: Base, name: str) -> Incoming:
    """Read an AdapterHub directory for a base model. Raises DeltaSpecError with all findings."""
    if (folder / SETUP).is_file():
        return read_setup(folder, base, name, read_adapter)
    return read_adapter(folder, base, name).incoming


def read_adapter(folder: Path, base: Base, name: str) -> Adapter:
    """Read one adapter. Raises DeltaSpecError with all findings."""
    adapter = Adapter(folder, base, name)
    parts = adapter.configurations()
    kinds = [_architecture(adapter, options) for options in parts]
    adapter.settle()
    adapter.incoming.kind = f"AdapterHub {' + '.join(dict.fromkeys(kinds))}"
    adapter.read_keys()
    for number, (options, kind) in enumerate(zip(parts, kinds, strict=True)):
        part = kind.removesuffix("_tuning").replace("_", "-") if len(parts) > 1 else ""
        if kinds.count(kind) > 1:
            part = f"{part}-{kinds[:number].count(kind) + 1}"
        try:
            known_architectures()[kind].read(adapter, options, part)
        except DeltaSpecError:  # its findings are kept, and other parts may have some
            if not adapter.findings:
                raise
        if not adapter.findings:  # else not all options were asked for
            options.finish(f"AdapterHub's {kind}")
    read_head(adapter)
    adapter.finish()
    return adapter


def _architecture(adapter: Adapter, options: Options) -> str:
    """Return the architecture of a configuration; one that cannot be read is a finding."""
    named = options.get("architecture") or BOTTLENECK
    if not isinstance(named, str) or named not in known_architectures():
        adapter.unknown("architecture", named, known_architectures(), CONFIG)
    return str(named)
