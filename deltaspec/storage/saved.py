"""A directory of saved deltas as it lies on disk: its manifest read and checked, its files read with their digests."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable, Mapping
from mmap import ACCESS_COPY, mmap
from os import PathLike
from pathlib import Path
from sys import float_info
from typing import Any, TypeVar

from torch import Tensor

from deltaspec.diagnostics.findings import DeltaSpecError, Diagnostic
from deltaspec.language.load import load
from deltaspec.language.model import DeltaSpec
from deltaspec.storage.delta_set import MANIFEST, DeltaSet


def without_values(delta: str, done: str) -> Diagnostic:
    """Return the finding about a delta on the meta device; `done` is what it cannot be."""
    message = f"{delta} is on the meta device, where tensors have no values, and cannot be {done}"
    hint = "compile or restore onto a model with weights"
    return Diagnostic("DS534", message, file="<model>", suggestion=hint)


FORMAT = 1
ENDINGS = {"file": "safetensors", "spec": "deltaspec.json", "lock": "deltaspec.lock.json"}
"""The files of one delta, by their field in the manifest."""
GOLDEN = "golden"
"""Field of a file with golden answers, which a delta may have besides, and the manifest, of all that is attached."""
ALL = ENDINGS | {GOLDEN: "golden.safetensors"}
TOGETHER = "attached"
"""How the name of the manifest's own file begins."""
_FILE_NAME = re.compile(
    r"[\w%-]{1,200}\.[0-9a-f]{8}\.((golden\.)?safetensors|deltaspec\.json|deltaspec\.lock\.json)", re.ASCII
)
_UNFINISHED = re.compile(rf"\.({_FILE_NAME.pattern}|manifest\.json)\.[0-9a-f]{{16}}", re.ASCII)
"""What `write_atomically` calls a file before it is whole."""
_MOST_HEADER = 100_000_000
"""Bytes that safetensors allows for the list of tensors in a file."""
_Content = TypeVar("_Content", bytes, mmap)


class SavedSet(DeltaSet):
    """A directory written by `save`, its manifest read and checked."""

    def __init__(self, directory: str | PathLike[str]) -> None:
        self._read, manifest = _read_manifest(Path(directory))
        super().__init__(Path(directory), manifest)

    def replaced(self) -> bool:
        """Return whether the deltas were saved again since: what was read of this set may be gone."""
        try:
            return (self.folder / MANIFEST).read_bytes() != self._read
        except OSError:
            return False

    def spec(self, name: str) -> DeltaSpec:
        """Read the spec that has a delta."""
        return load(self.folder / self.entry[name]["spec"])

    def keys(self, name: str) -> set[str] | None:
        """Return the names of the tensors that a file says it has, also where it is damaged behind that."""
        try:
            with (self.folder / self.entry[name]["file"]).open("rb") as file:
                length = int.from_bytes(file.read(8), "little")
                header = json.loads(file.read(min(length, _MOST_HEADER)))
        except (OSError, ValueError, RecursionError):
            return None
        return set(header) - {"__metadata__"} if isinstance(header, dict) else None

    def tensors(self, name: str, findings: list[Diagnostic]) -> dict[str, Tensor] | None:
        """Read a delta's tensors, its digest checked; None, with a finding, where that fails."""
        from safetensors import SafetensorError
        from safetensors.torch import load as from_bytes

        payload, problems = self.read(name, "file")
        findings += problems
        if payload is None:
            return None
        try:
            return dict(from_bytes(payload))
        except (SafetensorError, ValueError, KeyError) as error:
            file = self.entry[name]["file"]
            findings.append(self.finding("DS522", f"is no safetensors file: {error}", "save again", file))
            return None

    def read(self, name: str | None, field: str) -> tuple[bytes | None, list[Diagnostic]]:
        """Read one of a delta's files (a field of `ALL`), or (None) the set's own: (content, findings).

        Its digest is checked.
        """
        return self._checked(self.manifest if name is None else self.entry[name], field, Path.read_bytes)

    def map(self, name: str) -> tuple[mmap | None, list[Diagnostic]]:
        """Map a delta's tensors' file into memory, its digest checked: (content, findings).

        Writing to the content does not reach the file. `save` never writes into a file that is there, so the content
        stays what was checked, also when the deltas are saved again.
        """
        return self._checked(self.entry[name], "file", _map)

    def _checked(
        self, entry: Mapping[str, Any], field: str, read: Callable[[Path], _Content]
    ) -> tuple[_Content | None, list[Diagnostic]]:
        try:
            content = read(self.folder / entry[field])
        except OSError as error:
            message, hint = f"cannot be read: {error.strerror}", "restore the file"
            if isinstance(error, FileNotFoundError) and self.replaced():
                message, hint = "is gone: the deltas were saved again in the meantime", "open the directory anew"
            return None, [self.finding("DS521", message, hint, entry[field])]
        except ValueError:  # a file without content cannot be mapped
            content = None
        if content is None or digest(content) != entry[f"{field}_sha256"]:
            message = "is damaged: its content is not what was saved (truncated or changed)"
            hint = "save the deltas again, or restore the file"
            return None, [self.finding("DS522", message, hint, entry[field])]
        return content, []


def _read_manifest(folder: Path) -> tuple[bytes, dict[str, Any]]:
    def finding(code: str, message: str, hint: str) -> Diagnostic:
        return Diagnostic(code, message, file=str(folder / MANIFEST), suggestion=hint)

    hint = "give the directory that c.save(dir) wrote, or one of a PEFT, AdapterHub or OpenDelta adapter"
    try:
        content = (folder / MANIFEST).read_bytes()
        data = json.loads(content, object_pairs_hook=_object)
    except FileNotFoundError:
        raise DeltaSpecError([finding("DS521", "there are no saved deltas here", hint)]) from None
    except OSError as error:
        raise DeltaSpecError([finding("DS521", f"cannot be read: {error.strerror}", hint)]) from error
    except (ValueError, RecursionError) as error:
        raise DeltaSpecError([finding("DS522", f"is not a manifest: {error}", "save the deltas again")]) from error
    if wrong := _manifest_problem(data):
        raise DeltaSpecError([finding("DS522", f"is not a manifest: {wrong}", "save the deltas again")])
    return content, dict(data)


def _map(path: Path) -> mmap:
    with path.open("rb") as file:
        return mmap(file.fileno(), 0, access=ACCESS_COPY)


def file_names(folder: Path) -> set[str]:
    """Return the names of the files of the set in a directory, the manifest apart; empty where there is none."""
    try:
        saved = SavedSet(folder)
    except DeltaSpecError:
        return set()
    own = {saved.manifest[GOLDEN]} if GOLDEN in saved.manifest else set()
    return own | {entry[field] for entry in saved.entries for field in ALL if field in entry}


def strays(folder: Path, kept: set[str]) -> set[str]:
    """Return the names of files in a directory that earlier saves left, killed ones included, but for those kept."""
    names = set(os.listdir(folder)) - kept
    return {name for name in names if _FILE_NAME.fullmatch(name) or _UNFINISHED.fullmatch(name)}


def digest(content: bytes | mmap) -> str:
    """Return a file's SHA-256 in hexadecimal."""
    return hashlib.sha256(content).hexdigest()


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    data = dict(pairs)
    if len(data) < len(pairs):
        raise ValueError("it has a key twice")
    return data


def _manifest_problem(data: Any) -> str | None:
    if not isinstance(data, dict) or isinstance(data.get("deltaspec"), bool) or data.get("deltaspec") != FORMAT:
        return f"its format is not version {FORMAT}"
    backbone, deltas, attached = data.get("backbone"), data.get("deltas"), data.get("attached")
    if not isinstance(backbone, dict) or not {"class", "structure", "weights"} <= backbone.keys():
        return "it names no backbone"
    if not isinstance(backbone["class"], str) or not isinstance(backbone["structure"], str):
        return "it names no backbone"
    if not isinstance(backbone["weights"], str | None):
        return "its digest of the backbone's weights is malformed"
    if not isinstance(deltas, list) or not all(_is_entry(entry) for entry in deltas):
        return "its list of deltas is malformed"
    names = [entry["name"] for entry in deltas]
    if len(set(names)) < len(names):
        return "it names a delta twice"
    if not isinstance(attached, list) or not all(isinstance(name, str) for name in attached):
        return "its list of attached deltas is malformed"
    if not set(attached) <= set(names):
        return "it says that unknown deltas were attached"
    strengths = data.get("strengths", {})  # earlier versions wrote none
    if not isinstance(strengths, dict) or not all(map(_is_strength, strengths.values())):
        return "its strengths are malformed"
    return None if _may_be_golden(data) else "what it says of golden answers is malformed"


def _is_strength(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= float_info.max


def _is_entry(entry: Any) -> bool:
    """Return whether a manifest's entry is whole, and names files as `save` does: so they are in the directory."""
    fields = ("name", *(f"{field}{part}" for field in ENDINGS for part in ("", "_sha256")))
    if not isinstance(entry, dict) or not all(isinstance(entry.get(field), str) for field in fields):
        return False
    reads, own = entry.get("reads", []), entry.get("identity", "")  # earlier versions wrote none
    if not isinstance(own, str) or not isinstance(reads, list) or not all(isinstance(name, str) for name in reads):
        return False
    return _may_be_golden(entry) and all(_FILE_NAME.fullmatch(entry[field]) for field in ENDINGS)


def _may_be_golden(entry: Mapping[str, Any]) -> bool:
    """Return whether an entry, or a manifest, names a file of golden answers as `save` does, or none."""
    if GOLDEN not in entry:
        return True
    file, sha = entry[GOLDEN], entry.get(f"{GOLDEN}_sha256")
    return isinstance(file, str) and isinstance(sha, str) and _FILE_NAME.fullmatch(file) is not None
