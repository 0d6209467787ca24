"""Deltas on disk: per delta a safetensors file, the resolved spec and the lock; one manifest that makes them valid.

Files are named by their content and written first; the manifest is replaced last, in one step. So a crash at any moment
leaves the old set or the new one. Reading accounts for every key before anything is changed. Nothing is ever unpickled.

    manifest.json                                  what belongs to the set, and the backbone's fingerprints
    french.3f9a1c2b.safetensors                    its tensors
    french.3f9a1c2b.deltaspec.json                 a spec with this delta (and those linked to it by derived ones),
                                                   every parameter written out
    french.3f9a1c2b.deltaspec.lock.json            its lock
"""

from __future__ import annotations

import json
import os
from os import PathLike
from pathlib import Path
from typing import Any

from deltaspec.deltas.finite import is_finite, not_finite
from deltaspec.deltas.modules import Deltas
from deltaspec.diagnostics.findings import DeltaSpecError, Diagnostic
from deltaspec.documents.atomic import alone_in, sync, write_atomically
from deltaspec.planning.lock import lock
from deltaspec.planning.plan import Plan
from deltaspec.runtime.active import Active
from deltaspec.storage.saved import (
    ENDINGS,
    FORMAT,
    MANIFEST,
    digest,
    file_names,
    strays,
    without_values,
)


def save(active: Active, plan: Plan, deltas: Deltas, directory: str | PathLike[str]) -> None:
    """Write all deltas of a compiled model to a directory, made if need be; what it held of ours before is replaced.

    Raises DeltaSpecError where a delta holds NaN or infinite values (DS520), or none, on the meta device (DS534), or a
    derived one is attached and its sources have changed since (DS528), OSError where the directory cannot be written.
    """
    from safetensors.torch import save as to_bytes

    folder = Path(directory)
    active.derived.refresh_others(active.active)
    findings = [_behind(name) for name in active.derived.behind(active.active)]
    for planned in plan.deltas:
        tensors = dict(deltas[planned.name].tensors())
        if any(value.is_meta for value in tensors.values()):
            findings.append(without_values(planned.name, "saved"))
            continue
        findings += [not_finite(planned.name, key) for key, value in tensors.items() if not is_finite(value.detach())]
    if findings:
        raise DeltaSpecError(findings)
    weights = active.weights_fingerprint()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except FileExistsError:
        hint = "give a directory"
        raise DeltaSpecError([Diagnostic("DS521", "is a file", file=str(folder), suggestion=hint)]) from None
    with alone_in(folder) as alone:
        before, present, entries, written = file_names(folder), set(os.listdir(folder)), [], set[str]()
        try:
            for planned in plan.deltas:  # one delta's bytes in memory at a time
                part = plan.alone(planned.name)
                tensors = {key: value.detach().clone() for key, value in deltas[planned.name].tensors()}
                content = {
                    "file": to_bytes({key: value.contiguous() for key, value in tensors.items()}, {"format": "pt"}),
                    "spec": _json(part.specs[0].to_data()),
                    "lock": lock(part).encode(),
                }
                stem = f"{planned.name}.{digest(b''.join(content.values()))[:8]}"
                entry = {"name": planned.name}
                for field, ending in ENDINGS.items():
                    entry[field] = f"{stem}.{ending}"
                    entry[f"{field}_sha256"] = digest(content[field])
                    write_atomically(folder / entry[field], content[field])
                    written.add(entry[field])
                entries.append(entry)
            attached = [name for name in active.active if any(delta.name == name for delta in plan.deltas)]
            manifest = {
                "deltaspec": FORMAT,
                "backbone": {"class": plan.model_class, "structure": plan.structure, "weights": weights},
                "attached": attached,
                "strengths": active.strengths.as_dict(attached),
                "deltas": entries,
            }
            sync(folder)
            write_atomically(folder / MANIFEST, _json(manifest))
        except OSError:  # such as a full disk, which half a set would fill further; the old manifest is in place
            for name in written - present if alone else ():
                (folder / name).unlink(missing_ok=True)
            raise
        sync(folder)
        # Others that write here at the same time have files that no manifest names yet.
        for name in strays(folder, written) if alone else before - written:
            (folder / name).unlink(missing_ok=True)


def _json(data: Any) -> bytes:
    return (json.dumps(data, indent=2) + "\n").encode()


def _behind(delta: str) -> Diagnostic:
    message = f"{delta} is attached, and its sources have changed since it was computed"
    hint = f"compute it anew first: c.refresh({delta!r})"
    return Diagnostic("DS528", message, file="<model>", suggestion=hint)
