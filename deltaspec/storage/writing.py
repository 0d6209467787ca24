"""Writing a set of saved deltas: the files of each, then the manifest that makes them valid, in one step."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from deltaspec.diagnostics.findings import DeltaSpecError, Diagnostic
from deltaspec.documents.atomic import Together, alone_in
from deltaspec.language.derivation import in_order
from deltaspec.names.escaping import file_stem
from deltaspec.planning.lock import lock_data, lock_text
from deltaspec.planning.plan import Plan
from deltaspec.runtime.forks import ForkLock
from deltaspec.storage.delta_set import MANIFEST
from deltaspec.storage.identity import base_identity, identity
from deltaspec.storage.saved import ALL, FORMAT, TOGETHER, digest, file_names, strays


@dataclass(frozen=True, slots=True)
class Manifest:
    """What belongs to all deltas of a set."""

    backbone: Mapping[str, Any]
    """Its class, the digests of its structure and weights, its record."""
    origin: Mapping[str, str]
    """Name and revision of what the backbone was loaded from."""
    strengths: Mapping[str, float]
    """The deltas that are attached, and their strengths."""
    golden: bytes | None = None
    """Golden answers of all that is attached."""

    def to_data(self) -> dict[str, Any]:
        """Return its JSON data, but for the files."""
        changed = {name: strength for name, strength in self.strengths.items() if strength != 1}
        backbone, attached = dict(self.backbone), list(self.strengths)
        return {"deltaspec": FORMAT, "backbone": backbone, "attached": attached, "strengths": changed}


@dataclass(frozen=True, slots=True)
class Written:
    """One delta, as its files and its entry in the manifest have it."""

    name: str
    content: Mapping[str, bytes]
    """Content of its files, by their field in the manifest."""
    digests: Mapping[str, str]
    """SHA-256 of each, which nobody need compute again."""
    identity: str
    reads: list[str] = field(default_factory=list)
    """Tensors that it reads though deltas stand for them."""


_IMPORTS = ForkLock()


def _serialiser() -> Callable[[dict[str, torch.Tensor], dict[str, str]], bytes]:
    """Return what writes safetensors, with all imported that it imports when it is first called.

    A process that is forked while another thread imports would wait for that for ever.
    """
    with _IMPORTS.lock:
        from safetensors.torch import save as to_bytes

        to_bytes({"": torch.empty(0, device="cpu")}, {})
    return to_bytes


def contents(
    plan: Plan,
    names: tuple[str, ...],
    tensors: Callable[[str], Mapping[str, Tensor]],
    manifest: Manifest,
    read: Mapping[str, list[str]],
    golden: Mapping[str, bytes],
) -> Iterator[Written]:
    """Yield the files of each delta, sources first, one delta's bytes in memory at a time.

    `tensors` gives those of a delta, plain ones; `golden` are golden answers by delta.
    """
    to_bytes = _serialiser()
    sources = {entry.name: tuple(entry.sources) for spec in plan.specs for entry in spec.deltas}
    known, base = dict[str, str](), base_identity(manifest.backbone)
    for name in (name for name in in_order(sources) if name in names):
        part = plan.alone(name, names)
        plain = {key: value.clone().contiguous() for key, value in tensors(name).items()}
        parents = {source: known[source] for source in sources[name]}
        lineage = {"base": dict(manifest.origin), **({"parents": parents} if parents else {})}
        locked = lock_data(part)
        content = {
            "file": to_bytes(plain, {"format": "pt"}),
            "spec": json_bytes(part.specs[0].to_data()),
            "lock": lock_text(locked, lineage).encode(),
            **({"golden": golden[name]} if name in golden else {}),
        }
        digests = {key: digest(value) for key, value in content.items()}
        known[name] = identity(digests["file"], locked["deltas"][name], base)
        yield Written(name, content, digests, known[name], read.get(name, []))


def write(folder: Path, manifest: Manifest, names: Iterable[str], deltas: Iterable[Written]) -> None:
    """Write a set to a directory, made if need be; the files of an earlier one go. `names` is the order of its entries.

    Raises DeltaSpecError (DS521) where a file is in the way, OSError where the directory cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except FileExistsError:
        hint = "give a directory"
        raise DeltaSpecError([Diagnostic("DS521", "is a file", file=str(folder), suggestion=hint)]) from None
    with alone_in(folder) as alone:
        before, present, written = file_names(folder), set(os.listdir(folder)), set[str]()
        entries, data = dict[str, dict[str, Any]](), manifest.to_data()
        try:
            with Together(folder) as files:

                def put(stem: str, part: str, content: bytes, sha256: str) -> dict[str, str]:
                    file = f"{stem}.{ALL[part]}"
                    files.add(file, content)
                    written.add(file)
                    return {part: file, f"{part}_sha256": sha256}

                for delta in deltas:
                    stem = f"{file_stem(delta.name)}.{digest(''.join(delta.digests.values()).encode())[:8]}"
                    entry: dict[str, Any] = {"name": delta.name, "identity": delta.identity}
                    for part, content in delta.content.items():
                        entry |= put(stem, part, content, delta.digests[part])
                    entries[delta.name] = entry | ({"reads": delta.reads} if delta.reads else {})
                if manifest.golden is not None:
                    sha256 = digest(manifest.golden)
                    data |= put(f"{TOGETHER}.{sha256[:8]}", "golden", manifest.golden, sha256)
                ordered = [entries[name] for name in names]
                files.appear(MANIFEST, json_bytes(data | {"deltas": ordered}))
        except OSError:  # such as a full disk, which half a set would fill further; the old manifest is in place
            for name in written - present if alone else ():
                (folder / name).unlink(missing_ok=True)
            raise
        # Others that write here at the same time have files that no manifest names yet.
        for name in strays(folder, written) if alone else before - written:
            (folder / name).unlink(missing_ok=True)


def json_bytes(data: Any) -> bytes:
    """Write JSON data as a file."""
    return (json.dumps(data, indent=2) + "\n").encode()
