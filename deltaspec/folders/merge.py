"""Merging shard by shard: saved deltas folded into a folder of safetensors, for models that do not fit twice."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from functools import cache
from os import PathLike
from pathlib import Path

import torch
from torch import Tensor, nn

from deltaspec.backbone.loading import model_from
from deltaspec.backbone.tabulate import tabulate
from deltaspec.compiler.restore import planned_on
from deltaspec.deltas.initial import build_delta
from deltaspec.diagnostics.findings import DeltaSpecError, Diagnostic, require_known
from deltaspec.diagnostics.progress import tracked
from deltaspec.documents.occupied import refuse_inside
from deltaspec.folders.folding import Folding
from deltaspec.folders.output import copy_rest, whole, write_index
from deltaspec.folders.present import PresentFolder
from deltaspec.folders.weights import Folder, Named
from deltaspec.formats.base import Base
from deltaspec.formats.opening import located, open_set
from deltaspec.names.folding import shown
from deltaspec.planning.conflicts import Rivals
from deltaspec.planning.plan import Plan
from deltaspec.planning.planned import PlannedDelta
from deltaspec.storage.delta_set import DeltaSet
from deltaspec.storage.load import match as matched
from deltaspec.storage.matching import Match, Matcher, Outcome, checked
from deltaspec.storage.specs import specs_of
from deltaspec.transforms.merge import by_module, reads_ties, refuse_unmergeable


@torch.no_grad()
def merge_folder(
    directory: str | PathLike[str],
    base: str | PathLike[str],
    out: str | PathLike[str],
    *names: str,
    model: nn.Module | None = None,
    match: Match = "weights",
) -> tuple[str, ...]:
    """Fold saved deltas, by name or those that were attached, into a copy of a folder of safetensors, and return the
    keys of the tensors that are others there.

    The result is what `restore(…).merge(…)` gives, to the bit, with one shard in memory at a time. Other files are
    copied; tensors that nothing changes stay as they are. `model` says what the folder's tensors are part of, where its
    config.json does not: the meta device will do. `match` as for `restore`.

    Raises DeltaSpecError with all findings, and then nothing is written: those of `restore` and `merge`; a folder that
    cannot be read (DS554), or lacks what a delta changes (DS555); an `out` that is there already (DS558), or in what
    is read (DS590).
    """
    level, weights = checked(match), Folder(base)
    refuse_inside(Path(out), base, located(directory))
    backbone = model_from(str(base)) if model is None else model
    names_of = Named(weights, backbone, tabulate(backbone))
    saved = open_set(directory, cache(lambda: Base(backbone)))
    require_known(names, saved.names, saved.folder)
    chosen = names or tuple(saved.attached)
    if not chosen:
        message, hint = "nothing was attached, so nothing would be merged", "name deltas to merge"
        raise DeltaSpecError([Diagnostic("DS417", message, file=str(saved.folder), suggestion=hint)])
    plan, tensors = _read(saved, chosen, backbone, names_of, level)
    deltas = [delta for delta in plan.deltas if delta.name in chosen]
    refuse_unmergeable(deltas, backbone)
    _refuse_new_biases(deltas, backbone, weights)
    Rivals(deltas).refuse([delta.name for delta in deltas])
    strengths = {n: s for n, s in saved.attached.items() if n in chosen and s != 1}
    folding = Folding(backbone, names_of, by_module(deltas), tensors, strengths)
    names_of.refuse_missing(folding.needed())
    with whole(Path(out)) as folder:
        added = folding.untied()
        changed = _shards(folding, weights, folder, added)
        size = sum(tensor.nbytes for tensor in added.values())
        write_index(weights, folder, {key: weights.shard[folding.beside[key]] for key in added}, size)
        copy_rest(weights, folder, untied=folding.unties and not reads_ties(backbone))
    return tuple(changed)


def _refuse_new_biases(deltas: Sequence[PlannedDelta], model: nn.Module, weights: Folder) -> None:
    """Raise DeltaSpecError (DS555) for deltas that add biases, which a model that is loaded from a folder has not."""
    findings = []
    for delta in deltas:
        own = [site for site in delta.sites if any(spec.name == "bias" for spec in site.tensors)]
        at = [s.fqn for s in own if model.get_submodule(s.site.row.fqn)._parameters.get("bias") is None]
        if at:
            message = f"{delta.name} adds a bias to {shown(at)}, which a model that is loaded from a folder has not"
            hint = "keep it attached, or merge in memory and save that whole (torch.save)"
            findings.append(Diagnostic("DS555", message, file=str(weights.path), suggestion=hint))
    if findings:
        raise DeltaSpecError(findings)


def _read(
    saved: DeltaSet, chosen: tuple[str, ...], model: nn.Module, names_of: Named, match: Match
) -> tuple[Plan, dict[str, dict[str, Tensor]]]:
    """Plan saved deltas on a model, and read their tensors, by delta and storage key. Raises DeltaSpecError."""
    present, findings = PresentFolder(model, names_of), list[Diagnostic]()
    matcher = Matcher(present, match)
    specs = specs_of(saved, chosen)
    together = {entry.name for spec in specs for entry in spec.deltas}
    outcomes = matcher.outcomes(saved, [name for name in saved.names if name in together], findings)
    try:
        plan = planned_on(model, saved, specs, outcomes, present, None)
    except DeltaSpecError as error:
        raise DeltaSpecError([*findings, *error.diagnostics]) from error
    tensors: dict[str, dict[str, Tensor]] = {}
    for name in tracked(chosen, "reading deltas", len(chosen)):
        findings += saved.read(name, "lock")[1]
        targets = dict(build_delta(plan[name], 0, model, drawn=False).tensors())
        keys = {id(target): key for key, target in targets.items()}
        pairs = matched(saved, name, targets, findings, outcomes.get(name, Outcome()).prefix)
        tensors[name] = {keys[id(target)]: value.to(target.dtype) for target, value in pairs}
    if findings:
        raise DeltaSpecError(dict.fromkeys(findings))
    return plan, tensors


def _shards(folding: Folding, weights: Folder, out: Path, added: Mapping[str, Tensor]) -> list[str]:
    """Write all shards, one after the other; return the keys of tensors that changed or were added."""
    from safetensors.torch import save_file

    changed: list[str] = []
    touched = {weights.shard[key] for key in folding.keys} | {weights.shard[folding.beside[key]] for key in added}
    for file in tracked(weights.files, "merging shards", len(weights.files)):
        if file not in touched:
            shutil.copyfile(weights.path / file, out / file)
            continue
        shard = {key: weights.tensor(key) for key, own in weights.shard.items() if own == file}
        for key, before in shard.items():
            if (after := folding.value(key)) is not None and not torch.equal(after, before):
                changed.append(key)
                shard[key] = after
        more = {key: tensor for key, tensor in added.items() if weights.shard[folding.beside[key]] == file}
        changed += more
        made = {*changed}  # of them, several may share memory, which no file of safetensors may
        plain = {k: t.clone().contiguous() if k in made else t.contiguous() for k, t in {**shard, **more}.items()}
        save_file(plain, out / file, weights.metadata(file) or {"format": "pt"})
        del shard, plain
    return changed
