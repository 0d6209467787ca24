"""The regions of mixed batches: a host's forward in which every row has tensors of its own."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from deltaspec.deltas import storage_key
from deltaspec.diagnostics import Diagnostic
from deltaspec.frozen import FrozenStatistics
from deltaspec.methods import methods
from deltaspec.programs import Forward, Programmer, Visit, call_form, host_of
from deltaspec.slots import Slot, Source
from deltaspec.substitution import Fold, FoldedRows, Swapped

if TYPE_CHECKING:
    from deltaspec.attach import Attachments


def bind_rows(attachments: Attachments, host: str, given: Sequence[tuple[Slot, str]]) -> Forward:
    """Build a host's forward for slots, each of the kind of the named delta, in order of application."""
    programmer, module = attachments.programmer, attachments.programmer.modules[host]
    folds: list[tuple[Fold, tuple[Source, ...], Slot]] = []
    links, visits = [], []
    bound: list[Any] = []
    for slot, name in given:
        stack = attachments.stacks.of(name)
        for visit in (visit for visit in programmer.visits_of(name) if host_of(visit.planned.site) == host):
            visits.append(visit)
            link, _, dropout = programmer.link(visit, module)
            fqn = visit.planned.site.row.fqn
            sources = tuple(Source(stack, storage_key(fqn, spec), attachments.deltas) for spec in visit.planned.tensors)
            if visit.lowered:
                fold = Fold((), methods()[visit.method], link.params, visit.planned.site, link.form.tensors)
                folds.append((fold, sources, slot))
            else:
                links.append(replace(link, per_row=True))
                bound += [*sources, *dropout, slot]
    base: Any = programmer.own_forward(host)
    if folds:
        base = FoldedRows(module, tuple(folds))
    elif host in programmer.statistics:
        base = FrozenStatistics(module)
    built = programmer.region_of(host, visits, tuple(links))
    if "swapped" in built.bound:
        bound.append(Swapped(module))
    return functools.partial(built.function, base, *bound)


def refusals(attachments: Attachments, name: str) -> list[Diagnostic]:
    """Say why a delta cannot be under single rows of a batch (DS441); empty where it can."""
    programmer, found = attachments.programmer, []
    for visit in programmer.visits_of(name):
        if reason := _refusal(programmer, visit):
            message = f"delta {name!r} cannot be mixed row by row: {reason}"
            hint = f"run its rows apart, under c.only({name!r})"
            found.append(Diagnostic("DS441", message, suggestion=hint))
    return found[:1]


def _refusal(programmer: Programmer, visit: Visit) -> str | None:
    if not methods()[visit.method].promises.per_row:
        return f"{visit.method} is not usable for single rows"
    site = visit.planned.site
    module = programmer.modules[host_of(site)]
    if visit.lowered and site.host not in (None, site.row.fqn):
        return f"{site.host or 'the model'} reads the weight of {site.row.fqn} without calling it"
    if visit.lowered and call_form(type(module), site.kind)[0] is None:
        return f"it works through the weight of {site.fqn}, a {site.row.type}"
    if any(spec.buffer and spec.name.startswith("running_") for spec in visit.planned.tensors):
        return f"it has statistics of its own for {site.fqn}, which are those of a whole batch"
    if fqn := _sequence_first(programmer, site.row.fqn):
        kind = type(programmer.modules[fqn]).__name__
        return f"{fqn or 'the model'} ({kind}) takes the batch as its second dimension (batch_first=False)"
    return None


def _sequence_first(programmer: Programmer, fqn: str) -> str | None:
    """Give the module at or above a site that has positions first and rows second."""
    names = [fqn]
    while names[-1]:
        names.append(names[-1].rpartition(".")[0])
    return next((n for n in names if getattr(programmer.modules[n], "batch_first", True) is False), None)
