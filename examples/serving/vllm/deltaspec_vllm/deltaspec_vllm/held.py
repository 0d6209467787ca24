"""What a folder holds: an adapter of PEFT, or saved deltas, read without following a link."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FILES = ("adapter_config.json", "adapter_model.safetensors")
MANIFEST = "manifest.json"
_FIELDS = ("file", "spec", "lock")
"""What a manifest says of each delta's files."""


@dataclass(frozen=True)
class Held:
    """An adapter, or saved deltas."""

    content: str
    """Its name by its content; `sha256:`, in manifests, is another: a delta's."""
    files: dict[str, Path]
    """Files to copy, by their names."""
    read: dict[str, bytes]
    """Files whose content was read: that is what counts, whatever is in their place by now."""
    deltas: dict[str, str]
    """Names of saved deltas by the identities that the manifest has of them."""

    @property
    def is_saved(self) -> bool:
        """Whether these are saved deltas."""
        return MANIFEST in self.read

    def copy_to(self, folder: Path) -> None:
        """Copy the files into a new folder. What has no digest in a manifest is written as it was read."""
        folder.mkdir()
        for name, path in self.files.items():
            # A file that was changed since does not fit the manifest, which whoever reads the copy says.
            data = self.read[name] if name in self.read else _content(path)
            (folder / name).write_bytes(data)


def held_in(folder: Path) -> Held | None:
    """Return what a folder holds; None where there is none, or a link leads out of it."""
    if folder.is_symlink() or not folder.is_dir():
        return None
    if _is_own(folder / MANIFEST):
        return _saved(folder)
    if not all(_is_own(folder / name) for name in FILES):
        return None
    read = {name: _content(folder / name) for name in FILES}
    return Held(_named(*(read[name] for name in FILES)), {name: folder / name for name in FILES}, read, {})


def identity_of(folder: Path) -> str:
    """Return the name that what a folder holds has by its content. Raises ValueError where it holds nothing."""
    held = held_in(folder)
    if held is None:
        raise ValueError(f"{folder} holds no adapter")
    return held.content


def _saved(folder: Path) -> Held | None:
    """Read a manifest, which has the digests of all files; None where it names one that is not in its folder."""
    manifest = _content(folder / MANIFEST)
    try:
        entries: list[dict[str, Any]] = json.loads(manifest)["deltas"]
        names = [MANIFEST, *(entry[field] for entry in entries for field in _FIELDS)]
        deltas = {str(entry["identity"]): str(entry["name"]) for entry in entries if "identity" in entry}
        inside = all(Path(name).name == name and _is_own(folder / name) for name in names)
    except (ValueError, KeyError, TypeError, RecursionError):
        inside = False
    return Held(_named(manifest), {n: folder / n for n in names}, {MANIFEST: manifest}, deltas) if inside else None


def _content(path: Path) -> bytes:
    """Read a file that is no link. Raises OSError where it has become one."""
    with os.fdopen(os.open(path, os.O_RDONLY | os.O_NOFOLLOW), "rb") as file:
        return file.read()


def _is_own(path: Path) -> bool:
    return path.is_file() and not path.is_symlink()


def _named(*contents: bytes) -> str:
    whole = hashlib.sha256()
    for content in contents:
        whole.update(hashlib.sha256(content).digest())
    return f"content:{whole.hexdigest()}"
