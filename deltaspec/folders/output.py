"""A folder that is written whole or not at all, beside what its base has in other files."""

from __future__ import annotations

import json
import os
import secrets
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from deltaspec.diagnostics.findings import DeltaSpecError, Diagnostic
from deltaspec.folders.weights import INDEX, Folder

CONFIG = "config.json"
_WEIGHTS = (
    ".safetensors",
    ".safetensors.index.json",
    ".bin",
    ".bin.index.json",
    ".pt",
    ".pth",
    ".gguf",
    ".h5",
    ".msgpack",
)


@contextmanager
def whole(folder: Path) -> Iterator[Path]:
    """Give a folder to write into, which becomes `folder` at the end, and goes where something fails.

    Raises DeltaSpecError (DS558) where there is something already.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        message, hint = "is there already", "name a new folder, or an empty one"
        raise DeltaSpecError([Diagnostic("DS558", message, file=str(folder), suggestion=hint)])
    folder.parent.mkdir(parents=True, exist_ok=True)
    unfinished = folder.parent / f".{folder.name}.{secrets.token_hex(8)}"
    unfinished.mkdir()
    try:
        yield unfinished
        os.replace(unfinished, folder)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def copy_rest(base: Folder, out: Path, *, untied: bool) -> None:
    """Copy what a folder has besides weights: configuration, tokenizer. `untied`: the configuration says so, then."""
    for path in sorted(base.path.iterdir()):
        if path.is_file() and not path.name.endswith(_WEIGHTS):
            shutil.copyfile(path, out / path.name)
    if untied:
        config = json.loads((out / CONFIG).read_text(encoding="utf-8"))
        text = json.dumps(config | {"tie_word_embeddings": False}, indent=2, sort_keys=True)
        (out / CONFIG).write_text(f"{text}\n", encoding="utf-8")


def write_index(base: Folder, out: Path, added: Mapping[str, str], size: int) -> None:
    """Write the index of shards, where the base has one, with tensors that were added, and their size in bytes."""
    if base.index is None:
        return
    if not added:
        shutil.copyfile(base.path / INDEX, out / INDEX)
        return
    about: dict[str, Any] = dict(base.index.get("metadata") or {})
    if isinstance(about.get("total_size"), int):
        about["total_size"] += size
    data = {**base.index, "metadata": about, "weight_map": dict(sorted({**base.index["weight_map"], **added}.items()))}
    (out / INDEX).write_text(json.dumps(data, indent=2, sort_keys=True) + "\n", encoding="utf-8")
