"""Deltas on disk: per delta a safetensors file, the resolved spec and the lock; one manifest that makes them valid.

Files are named by their content and written first; the manifest is replaced last, in one step. So a crash at any moment
leaves the old set or the new one. Reading accounts for every key before anything is changed. Nothing is ever unpickled.

    manifest.json                                  what belongs to the set, and the record of the backbone
    french.3f9a1c2b.safetensors                    its tensors
    french.3f9a1c2b.deltaspec.json                 a spec with this delta (and those linked to it by derived ones),
                                                   every parameter written out
    french.3f9a1c2b.deltaspec.lock.json            its lock
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from os import PathLike
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import nn

from deltaspec.backbone.fingerprint import weights_fingerprint
from deltaspec.backbone.record import Present
from deltaspec.backbone.sharded import is_sharded, unsharded
from deltaspec.deltas.finite import is_finite, not_finite
from deltaspec.deltas.modules import Deltas
from deltaspec.diagnostics.findings import DeltaSpecError, Diagnostic, require_known
from deltaspec.diagnostics.progress import tracked
from deltaspec.documents.atomic import Together, alone_in
from deltaspec.names.escaping import file_stem
from deltaspec.planning.lock import lock
from deltaspec.planning.plan import Plan
from deltaspec.runtime.active import Active
from deltaspec.runtime.forks import ForkLock
from deltaspec.storage.changed import as_it_is, changed_since
from deltaspec.storage.delta_set import MANIFEST, DeltaSet
from deltaspec.storage.depends import Replaced, reads, replaced
from deltaspec.storage.matching import present_of
from deltaspec.storage.processes import in_first_process
from deltaspec.storage.saved import (
    ENDINGS,
    FORMAT,
    digest,
    file_names,
    strays,
    without_values,
)

_Files: TypeAlias = tuple[str, dict[str, bytes], list[str]]
"""A delta's name, the content of each of its files, and the tensors that it reads though deltas stand for them."""


def save(active: Active, plan: Plan, deltas: Deltas, directory: str | PathLike[str], names: Iterable[str] = ()) -> None:
    """Write deltas of a compiled model, by default all, to a directory, made if need be; ours that it held go.

    Those that a derived one is built from come with it. Where tensors are sharded over processes, each must call this
    at the same time; the first one writes.

    Raises DeltaSpecError where a delta holds NaN or infinite values (DS520), or none, on the meta device (DS534), or a
    derived one is attached and its sources have changed since (DS528), or the backbone was changed and a delta could
    not be restored onto it (DS536); OSError where the directory cannot be written.
    """
    require_known(names, [planned.name for planned in plan.deltas])
    chosen = plan.with_sources(names or [planned.name for planned in plan.deltas])
    active.derived.refresh_others(active.active)
    findings = [_behind(name) for name in active.derived.behind(active.active) if name in chosen]
    for name in chosen:
        tensors = dict(deltas[name].tensors())
        if any(value.is_meta for value in tensors.values()):
            findings.append(without_values(name, "saved"))
            continue
        wrong = [key for key, value in tensors.items() if not is_finite(unsharded(value.detach()))]
        findings += [not_finite(name, key) for key in wrong]
    if findings:
        raise DeltaSpecError(findings)
    present = present_of(active, plan)
    new = changed_since(plan, present, active.host)
    plan = as_it_is(plan, chosen, present, active.host, deltas)
    attached = [name for name in active.active if name in chosen]
    manifest, read = _manifest(plan, chosen, present, new, attached, active.strengths.as_dict(attached))
    contents = _contents(plan, deltas, chosen, read)
    held = [tensor for name in chosen for _, tensor in deltas[name].tensors()]

    def write(contents: Iterator[_Files]) -> None:
        _write(Path(directory), manifest, tracked(contents, "saving deltas", len(chosen)))

    if any(is_sharded(tensor) for tensor in (*present.tensors.values(), *held)):
        in_first_process(write, contents)
    else:
        write(contents)


def write_received(directory: str | PathLike[str], plan: Plan, model: nn.Module, received: DeltaSet) -> None:
    """Write a set that came from elsewhere, as planned on a model, which may lack values. Raises OSError."""
    present = Present(model, unused=lambda: plan.unused)
    manifest, read = _manifest(plan, received.names, present, {}, list(received.attached), received.attached)

    def contents() -> Iterator[_Files]:
        for name in received.names:
            part = plan.alone(name, received.names)
            values, _ = received.read(name, "file")
            assert values is not None
            content = {"file": values, "spec": _json(part.specs[0].to_data()), "lock": lock(part).encode()}
            yield name, content, read.get(name, [])

    _write(Path(directory), manifest, tracked(contents(), "writing deltas", len(received.names)))


def _manifest(
    plan: Plan,
    chosen: Collection[str],
    present: Present,
    new: Replaced,
    attached: list[str],
    strengths: Mapping[str, float],
) -> tuple[dict[str, Any], dict[str, list[str]]]:
    """Return the manifest without its deltas, and which tensors each reads though deltas stand for them.

    `new` are tensors that came after the model was compiled.
    """
    gone = {**new, **replaced(plan.deltas)}
    read, before = dict[str, list[str]](), dict[str, frozenset[int] | None]()
    for planned in plan.deltas:
        if planned.name in chosen and (own := reads(planned, before, gone)):
            read[planned.name] = own
        before |= replaced([planned])
    record = present.record(gone, [name for own in read.values() for name in own], plan.unused)
    manifest = {
        "deltaspec": FORMAT,
        "backbone": {
            "class": plan.model_class,
            "structure": plan.structure,
            "weights": weights_fingerprint(present.backbone, present.kept),
            "record": record.to_data(),
        },
        "attached": attached,
        "strengths": dict(strengths),
    }
    return manifest, read


_IMPORTS = ForkLock()


def _serialiser() -> Callable[[dict[str, torch.Tensor], dict[str, str]], bytes]:
    """Return what writes safetensors, with all imported that it imports when it is first called.

    A process that is forked while another thread imports would wait for that for ever.
    """
    with _IMPORTS.lock:
        from safetensors.torch import save as to_bytes

        to_bytes({"": torch.empty(0, device="cpu")}, {})
    return to_bytes


def _contents(plan: Plan, deltas: Deltas, names: tuple[str, ...], read: dict[str, list[str]]) -> Iterator[_Files]:
    """Yield the files of each delta, one delta's bytes in memory at a time."""
    to_bytes = _serialiser()
    for name in names:
        part = plan.alone(name, names)
        values = {key: unsharded(value.detach()) for key, value in deltas[name].tensors()}
        plain = {key: value.clone().contiguous() for key, value in values.items()}
        content = {
            "file": to_bytes(plain, {"format": "pt"}),
            "spec": _json(part.specs[0].to_data()),
            "lock": lock(part).encode(),
        }
        yield name, content, read.get(name, [])


def _write(folder: Path, manifest: dict[str, Any], contents: Iterator[_Files]) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except FileExistsError:
        hint = "give a directory"
        raise DeltaSpecError([Diagnostic("DS521", "is a file", file=str(folder), suggestion=hint)]) from None
    with alone_in(folder) as alone:
        before, present, entries, written = file_names(folder), set(os.listdir(folder)), [], set[str]()
        try:
            with Together(folder) as files:
                for name, content, reads_too in contents:
                    stem = f"{file_stem(name)}.{digest(b''.join(content.values()))[:8]}"
                    entry: dict[str, Any] = {"name": name}
                    for field, ending in ENDINGS.items():
                        entry[field] = f"{stem}.{ending}"
                        entry[f"{field}_sha256"] = digest(content[field])
                        files.add(entry[field], content[field])
                        written.add(entry[field])
                    entries.append(entry | ({"reads": reads_too} if reads_too else {}))
                files.appear(MANIFEST, _json(manifest | {"deltas": entries}))
        except OSError:  # such as a full disk, which half a set would fill further; the old manifest is in place
            for name in written - present if alone else ():
                (folder / name).unlink(missing_ok=True)
            raise
        # Others that write here at the same time have files that no manifest names yet.
        for name in strays(folder, written) if alone else before - written:
            (folder / name).unlink(missing_ok=True)


def _json(data: Any) -> bytes:
    return (json.dumps(data, indent=2) + "\n").encode()


def _behind(delta: str) -> Diagnostic:
    message = f"{delta} is attached, and its sources have changed since it was computed"
    hint = f"compute it anew first: c.refresh({delta!r})"
    return Diagnostic("DS528", message, file="<model>", suggestion=hint)
