"""Deltas on disk: per delta a safetensors file, the resolved spec and the lock; one manifest that makes them valid.

Files are named by their content and written first; the manifest is replaced last, in one step. So a crash at any moment
leaves the old set or the new one. Reading accounts for every key before anything is changed. Nothing is ever unpickled.

    manifest.json                                  what belongs to the set, and the record of the backbone
    french.3f9a1c2b.safetensors                    its tensors
    french.3f9a1c2b.deltaspec.json                 a spec with this delta (and those linked to it by derived ones),
                                                   every parameter written out
    french.3f9a1c2b.deltaspec.lock.json            its lock, with what it comes from
    french.3f9a1c2b.golden.safetensors             a few inputs, and what the model gave for them, if asked for
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import replace
from os import PathLike
from pathlib import Path
from typing import TypeAlias

from torch import Tensor, nn

from deltaspec.backbone.fingerprint import weights_fingerprint
from deltaspec.backbone.origin import origin
from deltaspec.backbone.record import Present
from deltaspec.backbone.sharded import is_sharded, unsharded
from deltaspec.deltas.finite import is_finite, not_finite
from deltaspec.deltas.modules import Deltas
from deltaspec.diagnostics.findings import DeltaSpecError, Diagnostic, require_known
from deltaspec.diagnostics.progress import tracked
from deltaspec.planning.plan import Plan
from deltaspec.runtime.active import Active
from deltaspec.storage.changed import as_it_is, changed_since
from deltaspec.storage.delta_set import DeltaSet
from deltaspec.storage.depends import Replaced, reads, replaced
from deltaspec.storage.matching import present_of
from deltaspec.storage.processes import in_first_process
from deltaspec.storage.saved import without_values
from deltaspec.storage.writing import Manifest, Written, contents, write

_Golden: TypeAlias = Callable[[tuple[str, ...], Mapping[str, float]], tuple[dict[str, bytes], bytes | None]]
"""Golden answers of these deltas, each alone, and of all that is attached."""


def save(
    active: Active,
    plan: Plan,
    deltas: Deltas,
    directory: str | PathLike[str],
    names: Iterable[str] = (),
    golden: _Golden | None = None,
) -> None:
    """Write deltas of a compiled model, by default all, to a directory, made if need be; ours that it held go.

    Those that a derived one is built from come with it. Where tensors are sharded over processes, each must call this
    at the same time; the first one writes. `golden` gives answers to be kept, once all else is found to be right.

    Raises DeltaSpecError where a delta holds NaN or infinite values (DS520), or none, on the meta device (DS534), or a
    derived one is attached and its sources have changed since (DS528), or the backbone was changed and a delta could
    not be restored onto it (DS536), or golden answers cannot be kept (DS550); OSError where the directory cannot be
    written.
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
    held = [tensor for name in chosen for _, tensor in deltas[name].tensors()]
    sharded = any(is_sharded(tensor) for tensor in (*present.tensors.values(), *held))
    if sharded and golden is not None:
        message, hint = "golden answers are not kept of a model in shards", "save without golden="
        raise DeltaSpecError([Diagnostic("DS550", message, file="<model>", suggestion=hint)])
    strengths = {name: active.strengths[name] for name in active.active if name in chosen}
    manifest, read = _manifest(plan, chosen, present, new, strengths)
    alone: Mapping[str, bytes] = {}
    if golden is not None:
        alone, together = golden(chosen, strengths)
        manifest = replace(manifest, golden=together)

    def values(name: str) -> dict[str, Tensor]:
        return {key: unsharded(value.detach()) for key, value in deltas[name].tensors()}

    def written(files: Iterator[Written]) -> None:
        write(Path(directory), manifest, chosen, tracked(files, "saving deltas", len(chosen)))

    files = contents(plan, chosen, values, manifest, read, alone)
    if sharded:
        in_first_process(written, files)
    else:
        written(files)


def write_set(
    directory: str | PathLike[str],
    plan: Plan,
    present: Present,
    strengths: Mapping[str, float],
    tensors: Callable[[str], Mapping[str, Tensor]],
) -> None:
    """Write the deltas of a plan that were never compiled; their values are those that `tensors` gives by name.

    `strengths` are those of what is attached; `present` is the backbone, which may lack values. Raises OSError.
    """
    names = tuple(delta.name for delta in plan.deltas)
    manifest, read = _manifest(plan, names, present, {}, strengths)
    files = contents(plan, names, tensors, manifest, read, {})
    write(Path(directory), manifest, names, tracked(files, "writing deltas", len(names)))


def write_received(directory: str | PathLike[str], plan: Plan, model: nn.Module, received: DeltaSet) -> None:
    """Write a set that came from elsewhere, as planned on a model, which may lack values. Raises OSError."""

    def tensors(name: str) -> dict[str, Tensor]:
        return {key: value.detach().cpu() for key, value in (received.tensors(name, []) or {}).items()}

    write_set(directory, plan, Present(model, unused=lambda: plan.unused), received.attached, tensors)


def _manifest(
    plan: Plan, chosen: Collection[str], present: Present, new: Replaced, strengths: Mapping[str, float]
) -> tuple[Manifest, dict[str, list[str]]]:
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
    backbone = {
        "class": plan.model_class,
        "structure": plan.structure,
        "weights": weights_fingerprint(present.backbone, present.kept),
        "record": record.to_data(),
    }
    return Manifest(backbone, origin(present.backbone), strengths), read


def _behind(delta: str) -> Diagnostic:
    message = f"{delta} is attached, and its sources have changed since it was computed"
    hint = f"compute it anew first: c.refresh({delta!r})"
    return Diagnostic("DS528", message, file="<model>", suggestion=hint)
