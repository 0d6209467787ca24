"""Saved deltas, or a foreign adapter, written in the form of another library without a compiled model.

No weights of the base are read, but where what is written follows from them.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from deltaspec.backbone.loading import model_from
from deltaspec.compiler.engine import require_served, wishes_for
from deltaspec.compiler.restore import prepared
from deltaspec.deltas.modules import storage_key
from deltaspec.diagnostics.findings import DeltaSpecError, require_known
from deltaspec.documents.occupied import refuse_inside
from deltaspec.formats.base import Base
from deltaspec.formats.opening import base_reference, located, open_set
from deltaspec.formats.outgoing import NEEDS_WEIGHTS, Outgoing, Wishes, outgoing
from deltaspec.formats.received import ReceivedSet
from deltaspec.formats.saving import Writer, write_files, writer
from deltaspec.methods.declarations import TensorSpec
from deltaspec.storage.delta_set import DeltaSet
from deltaspec.storage.load import match as matched
from deltaspec.storage.matching import Match

_WEIGHTS = ("DS542", NEEDS_WEIGHTS)
"""Codes of what a base with weights would mend."""
_AS_IT_IS = Wishes()


def export(
    source: str | os.PathLike[str],
    directory: str | os.PathLike[str],
    form: str,
    model: str | None = None,
    names: Sequence[str] = (),
    wishes: Wishes = _AS_IT_IS,
    engine: str | None = None,
    match: Match = "weights",
) -> Outgoing:
    """Write deltas of a directory, by default those that were attached, as one adapter of another form.

    `engine` is a serving engine that is to compute the same with it (`deltaspec.engines`): it is written for that one,
    and what that would still reject, ignore or get wrong is refused.
    `match` says how much of the base must be as it was when the deltas were saved, as for `restore`.
    `model` is what the command line calls the base model by; left out, the one that a foreign adapter names. Raises
    DeltaSpecError with all findings, and then nothing is written.
    """
    target, folder = writer(form), located(source)
    wishes = wishes if engine is None else wishes_for(engine, wishes)
    reference, wanted = base_reference(folder, model)
    chosen = _Chosen(tuple(names), wishes, match)
    called = _called(reference)
    refuse_inside(Path(directory), folder, *filter(os.path.isdir, [reference]))
    try:
        out, files = _written(folder, Base(model_from(reference, wanted)), called, chosen, target)
    except DeltaSpecError as error:
        if any(finding.code not in _WEIGHTS for finding in error.diagnostics):
            raise
        try:
            base = Base(model_from(reference, replace(wanted, weights=True)))
        except DeltaSpecError as none:
            raise DeltaSpecError([*error.diagnostics, *none.diagnostics]) from none
        out, files = _written(folder, base, called, chosen, target)
    if engine is not None:
        require_served(files, target.MAIN, out.base.model, engine, str(source))
    write_files(Path(directory), files, target.MAIN)
    return out


@dataclass(frozen=True, slots=True)
class _Chosen:
    """What is to be written of a set, and how."""

    names: tuple[str, ...]
    wishes: Wishes
    match: Match


def _called(reference: str) -> str | None:
    """Return what an adapter calls its base by, of what the command line does: no file, and no factory."""
    if os.path.isfile(reference):
        return os.path.dirname(reference) or "."
    return None if ":" in reference and not os.path.exists(reference) else reference


def _written(
    folder: Path, base: Base, called: str | None, chosen: _Chosen, target: Writer
) -> tuple[Outgoing, dict[str, bytes]]:
    saved = open_set(folder, lambda: base)
    out = _collected(saved, base, chosen)
    incoming = saved.incoming if isinstance(saved, ReceivedSet) else None
    out.named = (called, None) if incoming is None or incoming.base is None else (incoming.base, incoming.revision)
    return out, target.write(out)


def _collected(saved: DeltaSet, base: Base, wanted: _Chosen) -> Outgoing:
    """Collect deltas of a set, each tensor accounted for. Raises DeltaSpecError."""
    names = wanted.names
    require_known(names, saved.names, saved.folder)
    chosen = tuple(name for name in saved.names if name in (names or saved.attached))
    if not chosen:
        hint = f"name the deltas: {', '.join(f'--delta {name}' for name in saved.names)}"
        raise DeltaSpecError([saved.finding("DS417", "nothing was attached when this was saved", hint)])
    ready = prepared(base.model, saved, chosen, None, wanted.match)
    findings, tensors = list(ready.findings), dict[tuple[str, str], Tensor]()
    for name in (name for name in chosen if name in ready.outcomes):  # of others, there is a finding
        targets = {
            storage_key(at.site.row.fqn, spec): _place(spec) for at in ready.plan[name].sites for spec in at.tensors
        }
        keys = {id(place): key for key, place in targets.items()}
        for place, value in matched(saved, name, targets, findings, ready.outcomes[name].prefix):
            tensors[name, keys[id(place)]] = value
    if findings:
        raise DeltaSpecError(dict.fromkeys(findings))
    planned = [delta for delta in ready.plan.deltas if delta.name in chosen]
    strengths = {name: saved.attached.get(name, 1.0) for name in chosen}
    return outgoing(base, ready.plan, planned, lambda name, key: tensors[name, key], strengths, wanted.wishes)


def _place(spec: TensorSpec) -> Tensor:
    """Return a tensor of a delta's shape without values, which takes numbers of any precision."""
    exact = spec.dtype is not None and not getattr(torch, spec.dtype).is_floating_point
    dtype = getattr(torch, str(spec.dtype)) if exact else torch.float64
    return torch.empty(spec.shape, dtype=dtype, device="meta")
