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
from collections.abc import Callable
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn

from deltaspec.diagnostics import DeltaSpecError, Diagnostic
from deltaspec.files.atomic import alone_in, sync, write_atomically
from deltaspec.files.fingerprint import weights_fingerprint
from deltaspec.files.saved import ENDINGS, FORMAT, MANIFEST, SavedSet, digest, file_names, strays
from deltaspec.methods import methods
from deltaspec.methods._base import Method

if TYPE_CHECKING:
    from deltaspec.compiled import CompiledModel

_Read = TypeVar("_Read")


def save(compiled: CompiledModel, directory: str | PathLike[str]) -> None:
    """Write all deltas of a compiled model to a directory, made if need be; what it held of ours before is replaced.

    Raises DeltaSpecError where a delta holds NaN or infinite values (DS520), or none, on the meta device (DS534), or a
    derived one is attached and its sources have changed since (DS528), OSError where the directory cannot be written.
    """
    from safetensors.torch import save as to_bytes

    from deltaspec.lock import lock

    folder = Path(directory)
    plan, attachments = compiled.plan, compiled._attachments
    attachments.derive_detached()
    findings = [_behind(name) for name in attachments.behind()]
    for planned in plan.deltas:
        tensors = dict(compiled.deltas[planned.name].tensors())
        if any(value.is_meta for value in tensors.values()):
            findings.append(_without_values(planned.name, "saved"))
            continue
        findings += [_not_finite(planned.name, key) for key, value in tensors.items() if not _finite(value.detach())]
    if findings:
        raise DeltaSpecError(findings)
    weights = weights_fingerprint(compiled.backbone)
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
                tensors = {key: value.detach().clone() for key, value in compiled.deltas[planned.name].tensors()}
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
            manifest = {
                "deltaspec": FORMAT,
                "backbone": {"class": plan.model_class, "structure": plan.structure, "weights": weights},
                "attached": [name for name in compiled.attached if name not in attachments.libraries],
                "strengths": {n: v for n, v in compiled.strengths.items() if v != 1 and n not in attachments.libraries},
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


def load(compiled: CompiledModel, directory: str | PathLike[str]) -> None:
    """Read the tensors of all saved deltas into the deltas of the same names. All or nothing.

    Raises DeltaSpecError (DS521-DS529, DS534) with all findings, the model unchanged: files missing or damaged, another
    backbone, a delta that the model lacks or has with another method or other params, tensors missing, surplus, of
    another shape, of a dtype that would lose digits, or not finite; a model on the meta device.
    """
    _settled(directory, lambda saved: _load(compiled, saved))


def restore(
    model: nn.Module, directory: str | PathLike[str], *, capture: str = "auto", example_inputs: Any = None
) -> CompiledModel:
    """Compile the saved specs onto a model and load the saved tensors; the deltas that were attached when saving are
    attached, as strongly.

    Raises DeltaSpecError with all findings; `model` is never changed.
    """
    from deltaspec.compiler import refuse_unusable

    refuse_unusable(model, capture)
    return _settled(directory, lambda saved: _restore(model, saved, capture, example_inputs))


def _settled(directory: str | PathLike[str], read: Callable[[SavedSet], _Read]) -> _Read:
    """Read a set: the old one or the new one, where it is saved again meanwhile and the old one's files go."""
    while True:
        saved = SavedSet(directory)
        try:
            return read(saved)
        except DeltaSpecError:
            if not saved.replaced():
                raise


def _load(compiled: CompiledModel, saved: SavedSet) -> None:
    findings = saved.check_backbone(compiled.plan.structure, compiled.backbone, compiled.plan.model_class)
    staged: list[tuple[Tensor, Tensor]] = []
    own = [delta.name for delta in compiled.plan.deltas]  # those of libraries are no place for other tensors
    for name in saved.names:
        findings += saved.read(name, "lock")[1]
        if name not in own:
            known = ", ".join(own)
            findings.append(
                saved.finding("DS524", f"the model has no delta {name!r}", f"it has: {known}; compile its spec too")
            )
            continue
        findings += _other_meaning(saved, name, compiled)
        tensors = dict(compiled.deltas[name].tensors())
        if any(value.is_meta for value in tensors.values()):
            findings.append(_without_values(name, "loaded"))
        staged += match(saved, name, tensors, findings)
    if findings:
        raise DeltaSpecError(findings)
    with torch.no_grad():
        for target, value in staged:
            target.copy_(value)
    compiled._attachments.derive(compiled.deltas)


def _restore(model: nn.Module, saved: SavedSet, capture: str, example_inputs: Any) -> CompiledModel:
    from deltaspec.compiler import compile_plan
    from deltaspec.modules import tabulate
    from deltaspec.plan import plan
    from deltaspec.planning.planned import structure_fingerprint
    from deltaspec.spec import load as load_spec

    try:
        if findings := [f for entry in saved.entries for field in ENDINGS for f in saved.read(entry["name"], field)[1]]:
            raise DeltaSpecError(findings)
        specs = dict.fromkeys(load_spec(saved.path(entry["spec"])) for entry in saved.entries)  # derived ones share one
        planned = plan(model, *specs, example_inputs=example_inputs)
    except DeltaSpecError as error:  # of which another backbone may be the cause
        found = saved.check_backbone(structure_fingerprint(tabulate(model)), model, type(model).__name__)
        raise DeltaSpecError([*found, *error.diagnostics]) from error
    # Every value comes from the files: no decomposition of a weight, no tokenizer of a text is needed.
    compiled = compile_plan(model, planned, capture, drawn=False)
    _load(compiled, saved)
    compiled.only(saved.attached)
    return compiled


def match(
    saved: SavedSet, name: str, targets: dict[str, Tensor], findings: list[Diagnostic]
) -> list[tuple[Tensor, Tensor]]:
    """Account for every key of one delta: (target, value) pairs, and a finding for each that does not fit."""
    values = saved.tensors(name, findings)
    if values is None:
        return []
    file = saved.entry(name)["file"]

    def found(code: str, message: str, suggestion: str) -> None:
        findings.append(saved.finding(code, message, suggestion, file))

    staged = []
    for key in sorted(targets.keys() - values.keys()):
        found("DS525", f"{name}: tensor {key} is missing", "the delta has sites that were not saved: compare the specs")
    for key in sorted(values.keys() - targets.keys()):
        found("DS525", f"{name}: tensor {key} fits nowhere", "the model's delta lacks this site: compare the specs")
    for key in sorted(values.keys() & targets.keys()):
        value, target = values[key], targets[key]
        if value.shape != target.shape:
            found(
                "DS526",
                f"{name}: tensor {key} is {list(value.shape)}, the model's is {list(target.shape)}",
                "compare the params",
            )
        elif not _fits(value.dtype, target.dtype):
            found("DS526", f"{name}: tensor {key} is {value.dtype}, the model's is {target.dtype}", "convert the model")
        elif not _finite(value):
            findings.append(_not_finite(name, key, str(saved.path(file))))
        else:
            staged.append((target, value))
    return staged


def _other_meaning(saved: SavedSet, name: str, compiled: CompiledModel) -> list[Diagnostic]:
    """Compare a saved delta's spec with the model's: the same tensors mean something else under other params."""
    content, findings = saved.read(name, "spec")
    if content is None:
        return findings
    try:
        before = _meaning(json.loads(content), name)
    except (ValueError, KeyError, TypeError, AttributeError, StopIteration, RecursionError) as error:
        return [saved.finding("DS522", f"is no resolved spec: {error}", "save again", saved.entry(name)["spec"])]
    now = _meaning(compiled.plan.document(name), name)
    for key in sorted(before.keys() | now.keys()):
        if before.get(key) != now.get(key):
            message = f"{name}: {key} was {before.get(key)} when it was saved, the model's is {now.get(key)}"
            hint = "compile the saved spec, or deltaspec.restore(model, dir)"
            findings.append(saved.finding("DS529", message, hint, saved.entry(name)["spec"]))
    return findings


def _meaning(spec: dict[str, Any], name: str) -> dict[str, Any]:
    """Give what a delta's trained tensors depend on: its method and params, but for those of training and the start."""
    delta = next(delta for delta in spec["deltas"] if delta["name"] == name)
    params = {f"params.{key}": json.loads(json.dumps(value)) for key, value in delta.get("params", {}).items()}
    rest = {key: json.loads(json.dumps(delta[key])) for key in ("method", "overrides", "from") if key in delta}
    start = methods()[delta["method"]].start if delta.get("method") in methods() else Method.start
    return {k: v for k, v in (params | rest).items() if k not in {f"params.{key}" for key in ("dropout", *start)}}


def _fits(saved: torch.dtype, held: torch.dtype) -> bool:
    """Tell whether values of one dtype are exact in another of the same sort."""
    try:
        return saved.is_floating_point == held.is_floating_point and torch.promote_types(saved, held) == held
    except RuntimeError:  # torch has no promotion from float8
        return False


def _finite(value: Tensor) -> bool:
    return not value.is_floating_point() or bool(torch.isfinite(value).all())


def _not_finite(delta: str, key: str, file: str = "<model>") -> Diagnostic:
    hint = "the training diverged: go back to an earlier state"
    return Diagnostic(
        "DS520" if file == "<model>" else "DS527",
        f"{delta}: tensor {key} has NaN or infinite values",
        file=file,
        suggestion=hint,
    )


def _without_values(delta: str, done: str) -> Diagnostic:
    message = f"{delta} is on the meta device, where tensors have no values, and cannot be {done}"
    hint = "compile or restore onto a model with weights"
    return Diagnostic("DS534", message, file="<model>", suggestion=hint)


def _json(data: Any) -> bytes:
    return (json.dumps(data, indent=2) + "\n").encode()


def _behind(delta: str) -> Diagnostic:
    message = f"{delta} is attached, and its sources have changed since it was computed"
    hint = f"compute it anew first: c.refresh({delta!r})"
    return Diagnostic("DS528", message, file="<model>", suggestion=hint)
