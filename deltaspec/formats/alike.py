"""Adapters that differ in their values alone: of a library's, the first of a kind is read, and tells where all lie."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, replace
from functools import cached_property
from mmap import mmap
from pathlib import Path
from typing import Any, TypeAlias

from torch import Tensor

from deltaspec.diagnostics.findings import Diagnostic
from deltaspec.formats.base import Base
from deltaspec.formats.incoming import Incoming
from deltaspec.formats.received import ReceivedSet

_MOST_HEADER = 100_000_000
"""Bytes that safetensors allows for the list of tensors in a file."""
Signature: TypeAlias = tuple[tuple[tuple[str, bytes], ...], str, bytes, int]
"""Configuration files and their contents; the file of tensors, its header, its length."""


def signature(folder: Path, patterns: tuple[str, ...]) -> Signature | None:
    """Return what adapters alike have in common; None where it is not one file of safetensors with JSON beside it."""
    files = sorted({path for pattern in patterns for path in folder.glob(pattern)})
    weights = [path for path in files if path.suffix == ".safetensors"]
    others = [path for path in files if path.suffix == ".json"]
    if len(weights) != 1 or len(weights) + len(others) < len(files):
        return None
    try:
        with weights[0].open("rb") as file:
            size = file.read(8)
            header = size + file.read(min(int.from_bytes(size, "little"), _MOST_HEADER))
            length = os.fstat(file.fileno()).st_size
        return tuple((path.name, path.read_bytes()) for path in others), weights[0].name, header, length
    except OSError:
        return None  # reading it says what is wrong


def stamp(folder: Path, patterns: tuple[str, ...]) -> str:
    """Return what tells the files of a directory from those that took their place, without reading them."""
    files = sorted({path for pattern in patterns for path in folder.glob(pattern)})
    found = [(path.name, path.stat()) for path in files]
    return json.dumps([[name, about.st_size, about.st_mtime_ns, about.st_ino] for name, about in found])


@dataclass(frozen=True)
class Kind:
    """What was found out about the first adapter of a kind."""

    incoming: Incoming
    """All of it but the values."""
    name: str
    """What it was called."""
    common: Signature
    key_of: dict[str, str]
    """The names of the tensors in the file, and here."""

    @classmethod
    def of(cls, received: ReceivedSet, name: str, common: Signature) -> Kind | None:
        """Return the kind of an adapter; None where its values are not those of the file, each in one place."""
        loaded = received.incoming.loaded
        if len(received.names) != 1:
            return None
        values = received.tensors(received.names[0], []) or {}
        at = {_place(value): key for key, value in loaded.items()}
        key_of = {at.get(_place(value), ""): key for key, value in values.items()}
        whole = key_of.keys() == loaded.keys() and len(at) == len(loaded) == len(values)
        if not whole or not all(value.numel() for value in values.values()):
            return None
        deltas = [
            replace(delta, sites=tuple(replace(site, tensors={}) for site in delta.sites))
            for delta in received.incoming.deltas
        ]
        return cls(replace(received.incoming, deltas=deltas, loaded={}), name, common, key_of)

    def called(self, folder: Path, name: str) -> Incoming:
        """Return what is known of another adapter of this kind."""
        deltas = [replace(delta, name=name + delta.name[len(self.name) :]) for delta in self.incoming.deltas]
        return replace(self.incoming, folder=folder, deltas=deltas)

    @cached_property
    def header(self) -> bytes:
        """The header of its file, with the names that tensors have here."""
        known = json.loads(self.common[2][8:])
        text = json.dumps({here: known[there] for there, here in self.key_of.items()}).encode()
        text += b" " * (-len(text) % 8)
        return len(text).to_bytes(8, "little") + text


def _place(value: Tensor) -> tuple[Any, ...]:
    """Return what tells a tensor from all others, and from another look at the same values."""
    return value.data_ptr(), value.dtype, value.shape, value.stride()


class AlikeSet(ReceivedSet):
    """An adapter of a known kind. Its values are read, and looked at, each time they are asked for."""

    def __init__(self, kind: Kind, folder: Path, name: str, base: Base, stamp: str = "") -> None:
        self._kind = kind
        super().__init__(kind.called(folder, name), base, stamp)

    def _place_all(self) -> None:
        """Place nothing: where all is was found out."""

    def keys(self, name: str) -> set[str] | None:
        """Return the names of a delta's tensors."""
        return set(self._kind.key_of.values())

    def tensors(self, name: str, findings: list[Diagnostic]) -> dict[str, Tensor] | None:
        """Return a delta's tensors; None, with a finding, where the file is not what it was."""
        from safetensors.torch import load

        content, problems = self.read(name, "file")
        findings += problems
        return None if content is None else dict(load(content))

    def read(self, name: str, field: str) -> tuple[bytes | None, list[Diagnostic]]:
        """Return one of a delta's contents as it would lie on disk."""
        if field != "file":
            return super().read(name, field)
        mapped, problems = self.map(name)
        return None if mapped is None else mapped[:], problems

    def map(self, name: str) -> tuple[mmap | None, list[Diagnostic]]:
        """Return a delta's tensors as a mapped file would hold them: (content, findings)."""
        _, file, theirs, length = self._kind.common
        ours = self._kind.header
        try:
            with (self.folder / file).open("rb", buffering=0) as stream:
                same = os.fstat(stream.fileno()).st_size == length and stream.read(len(theirs)) == theirs
                mapped = mmap(-1, len(ours) + length - len(theirs))
                mapped.write(ours)
                with memoryview(mapped) as view:
                    at = len(ours)
                    while same and at < len(view):
                        count = stream.readinto(view[at:])
                        same, at = bool(count), at + (count or 0)
        except OSError as error:
            return None, [self.finding("DS521", f"cannot be read: {error.strerror}", "restore the file", file)]
        if not same:
            message, hint = "was replaced since the library was opened", "library.refresh() takes in what is there now"
            return None, [self.finding("DS521", message, hint, file)]
        return mapped, []
