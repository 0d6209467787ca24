"""`extract`: a full fine-tune minus its base, as saved deltas."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from deltaspec.backbone.loading import model_from
from deltaspec.backbone.origin import origin
from deltaspec.backbone.record import Present
from deltaspec.backbone.table import ModuleTable
from deltaspec.backbone.tabulate import tabulate
from deltaspec.deltas.modules import storage_key
from deltaspec.diagnostics.findings import DeltaSpecError, Diagnostic
from deltaspec.diagnostics.wording import counted
from deltaspec.documents.occupied import refuse_inside, refuse_occupied
from deltaspec.folders.differences import Change, Comparer
from deltaspec.folders.present import PresentFolder
from deltaspec.folders.weights import Folder, ModuleTensors, Named, Tensors
from deltaspec.names.paths import below
from deltaspec.planning.plan import Plan
from deltaspec.planning.resolve import plan
from deltaspec.selection.generalise import selector_of
from deltaspec.storage.card import write_card
from deltaspec.storage.delta_set import refuse_saved
from deltaspec.storage.save import write_set

ERROR = 0.01
"""Relative error of each site, where nothing is said."""
Model = nn.Module | str | PathLike[str]


@dataclass(frozen=True, slots=True)
class Extraction:
    """What was extracted."""

    plan: Plan
    """The deltas."""
    changes: tuple[Change, ...]
    """What changed, and how exactly it is said: `.fqn`, `.method`, `.error`."""
    rounded: tuple[str, ...] = ()
    """Tensors that differ by rounding to the fine-tune's coarser dtype alone: they stay as the base has them."""

    def __str__(self) -> str:
        return "\n".join([*map(str, self.changes), *self.notes])

    @property
    def notes(self) -> list[str]:
        """What one must know besides."""
        if not self.rounded:
            return []
        count = counted(len(self.rounded), "tensor")
        return [f"{count} of the fine-tune: the base's own, rounded to a coarser dtype; left as the base has them"]


@torch.no_grad()
def extract(
    full: Model,
    base: Model,
    out: str | PathLike[str],
    *,
    rank: int | None = None,
    error: float = ERROR,
    name: str = "extracted",
) -> Extraction:
    """Write what a full fine-tune changed of its base as saved deltas, which `deltaspec.restore(base, out)` takes.

    Both are models, or folders of safetensors, which are read tensor by tensor. A matrix becomes a lora of the least
    rank whose relative error is at most `error`, or of rank `rank`; few rows of an embedding become trainable_tokens;
    all else, and what would cost more as factors, becomes `full`, exactly. The error of each site is measured, and
    written into the card. What a fine-tune in a coarser dtype merely rounds stays as the base has it, and is counted.

    Raises DeltaSpecError with all findings, nothing written: folders that cannot be read (DS554), models of different
    structure (DS556), changes that no delta can say (DS557) or values that are not finite (DS520).
    """
    if rank is not None and rank < 1:
        raise ValueError(f"rank is at least 1, not {rank}")
    if not 0 <= error < 1:
        raise ValueError(f"error is a share, from 0 to 1, not {error}")
    refuse_occupied(Path(out))
    refuse_saved(Path(out))
    refuse_inside(Path(out), *(each for each in (full, base) if not isinstance(each, nn.Module)))
    model = base if isinstance(base, nn.Module) else model_from(str(base))
    table = tabulate(model)
    ours, theirs = (_tensors(each, model, table) for each in (base, full))
    comparer = Comparer(table, ours, theirs, rank, error)
    changes = tuple(comparer.changes())
    findings = [*comparer.findings, *_surplus(ours, theirs)]
    if not changes and not findings:
        but = " but for rounding" if comparer.rounded else ""
        message, hint = f"the two models are equal{but}, so there is nothing to extract", "name the fine-tune first"
        findings = [Diagnostic("DS557", message, file=str(out), suggestion=hint)]
    if findings:
        raise DeltaSpecError(findings)
    groups = _groups(changes, name)
    planned = plan(model, _spec(groups, table))
    values = {delta: _values(planned, delta, own, theirs) for delta, own in groups.items()}
    present = Present(model) if isinstance(base, nn.Module) else PresentFolder(model, ours)
    write_set(out, planned, present, dict.fromkeys(groups, 1.0), values.__getitem__)
    where = origin(model).get("id") if isinstance(base, nn.Module) else str(base)
    found = Extraction(planned, changes, tuple(comparer.rounded))
    notes = ["Extracted from a full fine-tune; relative error of each change:", "", *(f"- `{c}`" for c in changes)]
    write_card(Path(out), planned, type(model), where, [*notes, *(line for n in found.notes for line in ("", n))])
    return found


def _tensors(each: Model, model: nn.Module, table: ModuleTable) -> Tensors:
    return ModuleTensors(each) if isinstance(each, nn.Module) else Named(Folder(each), model, table)


def _surplus(base: Tensors, full: Tensors) -> list[Diagnostic]:
    """Return a finding for tensors of the fine-tune that the base's model does not have, nor its folder."""
    known = base.unnamed() if isinstance(base, Named) else set()
    more = sorted((full.unnamed() if isinstance(full, Named) else set()) - known)
    if not more:
        return []
    message = f"the fine-tune has {', '.join(more[:3])}{' …' * (len(more) > 3)}, which the base's model has not"
    hint = "load both by the class of the fine-tune, and save the base from it"
    return [Diagnostic("DS556", message, file="<fine-tune>", suggestion=hint)]


def _groups(changes: Sequence[Change], name: str) -> dict[str, list[Change]]:
    """Put changes that one delta can say together, those that replace before those that add."""
    found: dict[tuple[int, str], list[Change]] = {}
    for change in changes:
        if change.method == "lora":
            kind = (9, "")
        elif change.method == "full":
            kind = (0, "full" if change.tied is None else f"full-{change.tied}")
        else:
            kind = (1, f"rows-{sum(key[0] == 1 for key in found) + 1}")  # each table has ids of its own
        found.setdefault(kind, []).append(change)
    ordered = sorted(found.items())
    return {name if len(found) == 1 or not kind[1] else f"{name}-{kind[1]}": own for kind, own in ordered}


def _spec(groups: Mapping[str, Sequence[Change]], table: ModuleTable) -> dict[str, Any]:
    return {"deltaspec": 1, "deltas": [_entry(name, own, table) for name, own in groups.items()]}


def _entry(name: str, changes: Sequence[Change], table: ModuleTable) -> dict[str, Any]:
    places = frozenset((change.row.fqn, change.parameter) for change in changes)
    params: dict[str, Any] = {}
    overrides = []
    if changes[0].rows:
        params["token_ids"] = list(changes[0].rows)
    if changes[0].tied is not None and changes[0].factors is None:
        params["tied"] = changes[0].tied
    if changes[0].factors is not None:
        ranks = Counter(change.factors.rank for change in changes if change.factors is not None)
        usual = ranks.most_common(1)[0][0]
        params |= {"rank": usual, "alpha": float(usual)}
        for rank in sorted(ranks.keys() - {usual}):
            own = frozenset((c.row.fqn, None) for c in changes if c.factors is not None and c.factors.rank == rank)
            own_params = {"rank": rank, "alpha": float(rank)}
            overrides.append({"match": selector_of(own, table, places), "params": own_params})
    mixed = len({parameter is None for _, parameter in places}) > 1
    target: Any = selector_of(places, table)
    if mixed:
        modules = frozenset(place for place in places if place[1] is None)
        target = {"any": [selector_of(modules, table), selector_of(places - modules, table)]}
    entry = {"name": name, "method": changes[0].method, "params": params, "target": target, "overrides": overrides}
    return {key: value for key, value in entry.items() if value} | {"expect": {"sites": _sites(changes)}}


def _sites(changes: Sequence[Change]) -> dict[str, int]:
    """Return bounds of the number of sites: tied places of one tensor are sites, too."""
    return {"min": len(changes)} if changes[0].tied == "together" else {"min": len(changes), "max": len(changes)}


def _values(planned: Plan, name: str, changes: Sequence[Change], full: Tensors) -> dict[str, Tensor]:
    """Return the tensors of a delta by storage key, in the dtypes that they have on this model."""
    by_site = {change.row.fqn: change for change in changes}
    values: dict[str, Tensor] = {}
    for site in planned[name].sites:
        row = site.site.row
        for spec in site.tensors:
            change = by_site.get(row.fqn)
            if change is not None and change.factors is not None:
                value = (change.factors.down if spec.name == "down" else change.factors.up).reshape(spec.shape)
            else:
                held = full.find(below(row.fqn, spec.name))
                assert held is not None
                value = held if spec.init.rows is None else held[list(spec.init.rows)]
            dtype = value.dtype if spec.dtype is None and value.dtype == torch.float64 else torch.float32
            dtype = dtype if spec.dtype is None else getattr(torch, spec.dtype)
            values.setdefault(storage_key(row.fqn, spec), value.to(dtype))
    return values
