"""Conversion: an adapter that another library wrote becomes a spec as a person would write it, and saved deltas."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml
from torch import nn

from deltaspec.backbone.loading import Wanted, model_from
from deltaspec.diagnostics.findings import DeltaSpecError, Diagnostic
from deltaspec.documents.atomic import write_atomically
from deltaspec.documents.occupied import refuse_inside, refuse_occupied
from deltaspec.formats.base import Base
from deltaspec.formats.opening import base_reference, delta_name, format_of, located, no_adapter, refuse_no_adapter
from deltaspec.formats.received import ReceivedSet
from deltaspec.language.load import load
from deltaspec.names.escaping import file_stem
from deltaspec.planning.lock import lock_path, write_lock
from deltaspec.planning.plan import Plan
from deltaspec.planning.resolve import resolve
from deltaspec.storage.card import write_card
from deltaspec.storage.delta_set import MANIFEST, refuse_saved
from deltaspec.storage.save import write_received

SPEC = ".deltaspec.yaml"


@dataclass(frozen=True)
class Conversion:
    """What came of an adapter."""

    received: ReceivedSet
    plan: Plan
    spec: Path
    """The spec, for the repository; its lock lies beside it."""

    @property
    def account(self) -> dict[str, str]:
        """Each key of the adapter's files, and what became of it."""
        return self.received.incoming.account


def convert(
    source: str | os.PathLike[str],
    directory: str | os.PathLike[str],
    model: str | nn.Module | None = None,
    name: str | None = None,
) -> Conversion:
    """Write a foreign adapter as saved deltas into a directory, with its spec and lock for a repository.

    `model` is the base model, or what the command line calls it by; left out, the one that the adapter names. Its
    weights are read only where a delta keeps something that follows from them. Raises DeltaSpecError with all findings,
    and then nothing is written.
    """
    folder = located(source)
    known = format_of(folder)
    if known is None:
        if (folder / MANIFEST).is_file():
            hint = "restore, load and export take it as it is"
            finding = Diagnostic("DS545", "holds saved deltas, which need no conversion", str(folder), suggestion=hint)
            raise DeltaSpecError([finding])
        refuse_no_adapter(folder)
        raise no_adapter(folder)
    refuse_occupied(Path(directory))
    refuse_saved(Path(directory))
    refuse_inside(Path(directory), folder, *filter(os.path.isdir, [model] if isinstance(model, str) else []))
    reference: str | nn.Module
    reference, wanted = (model, Wanted()) if isinstance(model, nn.Module) else base_reference(folder, model)
    called = name or delta_name(folder)
    spec = Path(directory) / f"{file_stem(called)}{SPEC}"
    if spec.exists():
        hint = "give another directory or name, or delete it first"
        raise DeltaSpecError([Diagnostic("DS562", "is there already", str(spec), suggestion=hint)])
    base = _base(reference, wanted)
    try:
        received = ReceivedSet(known.read(folder, base, called), base)
    except DeltaSpecError as error:
        if not isinstance(reference, str) or any(finding.code != "DS542" for finding in error.diagnostics):
            raise
        base = _base(reference, replace(wanted, weights=True))
        received = ReceivedSet(known.read(folder, base, called), base)
    return _written(received, spec)


def _base(reference: str | nn.Module, wanted: Wanted) -> Base:
    return Base(reference if isinstance(reference, nn.Module) else model_from(reference, wanted))


def _written(received: ReceivedSet, spec: Path) -> Conversion:
    directory = spec.parent
    plan = received.plan().with_remarks(dict.fromkeys(received.names, received.notes), {})
    model = received.base.model
    write_received(directory, plan, model, received)
    document = received.document()
    for delta in document["deltas"]:
        delta["expect"] = {"sites": len(plan[delta["name"]].sites)}
    write_atomically(spec, _text(document, received).encode())
    write_lock(resolve((load(spec),), received.base.table, received.base.observations), lock_path(spec))
    write_card(directory, plan, type(model), received.incoming.base)
    return Conversion(received, plan, spec)


def _text(document: dict[str, Any], received: ReceivedSet) -> str:
    incoming = received.incoming
    lines = [f"# From {incoming.kind}" + (f", trained on {incoming.base}" if incoming.base else "")]
    lines += [f"# {remark}" for remark in incoming.remarks]
    document = json.loads(json.dumps(document))  # what two deltas share is written out at both: specs have no anchors
    text = yaml.safe_dump(document, sort_keys=False, allow_unicode=True, width=110, default_flow_style=None)
    return "\n".join((*(" ".join(line.split()) for line in lines), text))
