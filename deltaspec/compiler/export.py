"""Saved deltas, or a foreign adapter, written in the form of another library without a compiled model.

No weights of the base are read, but where what is written follows from them.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from deltaspec.backbone.loading import model_from
from deltaspec.compiler.engine import require_served, wishes_for
from deltaspec.compiler.restore import prepared
from deltaspec.deltas.modules import storage_key
from deltaspec.diagnostics.findings import DeltaSpecError, require_known
from deltaspec.formats.base import Base
from deltaspec.formats.opening import base_reference, located, open_set
from deltaspec.formats.outgoing import NEEDS_WEIGHTS, Outgoing, Wishes, outgoing
from deltaspec.formats.received import ReceivedSet
from deltaspec.formats.saving import Writer, write_files, writer
from deltaspec.methods.declarations import TensorSpec
from deltaspec.storage.delta_set import DeltaSet
from deltaspec.storage.load import match

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
) -> Outgoing:
    """Write deltas of a directory, by default those that were attached, as one adapter of another form.

    `engine` is a serving engine that is to compute the same with it (`deltaspec.engines`): it is written for that one,
    and what that would still reject, ignore or get wrong is refused.
    `model` is what the command line calls the base model by; left out, the one that a foreign adapter names. Raises
    DeltaSpecError with all findings, and then nothing is written.
    """
    target, folder = writer(form), located(source)
    wishes = wishes if engine is None else wishes_for(engine, wishes)
    reference, wanted = base_reference(folder, model)
    called = _called(reference)
    try:
        out, files = _written(folder, Base(model_from(reference, wanted)), called, tuple(names), wishes, target)
    except DeltaSpecError as error:
        if any(finding.code not in _WEIGHTS for finding in error.diagnostics):
            raise
        try:
            base = Base(model_from(reference, replace(wanted, weights=True)))
        except DeltaSpecError as none:
            raise DeltaSpecError([*error.diagnostics, *none.diagnostics]) from none
        out, files = _written(folder, base, called, tuple(names), wishes, target)
    if engine is not None:
        require_served(files, target.MAIN, Path(directory), out.base.model, engine)
    write_files(Path(directory), files, target.MAIN)
    return out


def _called(reference: str) -> str | None:
    """Return what an adapter calls its base by, of what the command line does: no file, and no factory."""
    if os.path.isfile(reference):
        return os.path.dirname(reference) or "."
    return None if ":" in reference and not os.path.exists(reference) else reference


def _written(
    folder: Path, base: Base, called: str | None, names: tuple[str, ...], wishes: Wishes, target: Writer
) -> tuple[Outgoing, dict[str, bytes]]:
    saved = open_set(folder, lambda: base)
    out = _collected(saved, base, names, wishes)
    incoming = saved.incoming if isinstance(saved, ReceivedSet) else None
    out.named = (called, None) if incoming is None or incoming.base is None else (incoming.base, incoming.revision)
    return out, target.write(out)


def _collected(saved: DeltaSet, base: Base, names: tuple[str, ...], wishes: Wishes) -> Outgoing:
    """Collect deltas of a set, each tensor accounted for. Raises DeltaSpecError."""
    require_known(names, saved.names)
    chosen = tuple(name for name in saved.names if name in (names or saved.attached))
    if not chosen:
        hint = f"name the deltas: {', '.join(f'--delta {name}' for name in saved.names)}"
        raise DeltaSpecError([saved.finding("DS417", "nothing was attached when this was saved", hint)])
    ready = prepared(base.model, saved, chosen, None, "weights")
    findings, tensors = list(ready.findings), dict[tuple[str, str], Tensor]()
    for name in chosen:
        targets = {
            storage_key(at.site.row.fqn, spec): _place(spec) for at in ready.plan[name].sites for spec in at.tensors
        }
        keys = {id(place): key for key, place in targets.items()}
        for place, value in match(saved, name, targets, findings, ready.outcomes[name].prefix):
            tensors[name, keys[id(place)]] = value
    if findings:
        raise DeltaSpecError(dict.fromkeys(findings))
    planned = [delta for delta in ready.plan.deltas if delta.name in chosen]
    strengths = {name: saved.attached.get(name, 1.0) for name in chosen}
    return outgoing(base, ready.plan, planned, lambda name, key: tensors[name, key], strengths, wishes)


def _place(spec: TensorSpec) -> Tensor:
    """Return a tensor of a delta's shape without values, which takes numbers of any precision."""
    exact = spec.dtype is not None and not getattr(torch, spec.dtype).is_floating_point
    dtype = getattr(torch, str(spec.dtype)) if exact else torch.float64
    return torch.empty(spec.shape, dtype=dtype, device="meta")
