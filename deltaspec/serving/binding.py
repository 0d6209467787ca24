"""Binding what works beside a module's call to the rows of a batch: prefixes in attention, prompts in front."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from deltaspec.backbone.attention import Attention
from deltaspec.deltas.modules import Deltas
from deltaspec.graphs.row_ops import align, rows_in, toward_rows
from deltaspec.methods.declarations import DeltaTensors
from deltaspec.methods.registry import methods
from deltaspec.runtime.forms import form_of
from deltaspec.runtime.lowering import Attend, Lowered
from deltaspec.runtime.placements import Placement
from deltaspec.runtime.program_builder import ProgramBuilder
from deltaspec.runtime.sockets import Forward
from deltaspec.runtime.streams import tap
from deltaspec.serving.families import Family, site_key
from deltaspec.serving.numbering import numbering_of
from deltaspec.serving.prompts import EmbeddedRows, FollowingRows, PromptedRows, RowFront
from deltaspec.serving.slots import Slot
from deltaspec.serving.sources import Source, Table


class AttendRows:
    """A hook into an attention function, of the deltas of one slot: keys and values of each row, seen by it alone."""

    def __init__(self, attend: Attend, table: Table) -> None:
        self.attend, self.table = attend, table

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, base: Attention) -> Any:
        """Compute attention, by each row's strength."""
        slot, size = self.table.slot, query.shape[0]
        rows_in(slot, query)
        if slot.empty:
            return base(query, key, value)
        present = slot.grown("index", size) > 0

        def inside(q: Tensor, k: Tensor, v: Tensor) -> Any:
            return base(q, k, v, present)

        taken = self.table.take(size)
        if torch.compiler.is_compiling() or not all(place for place, _ in slot.line.order):
            # What a row without a delta may not see is multiplied by 0 there, and must be a number.
            taken = tuple(torch.where(align(present, value), value, 0) for value in taken)
        own = DeltaTensors(self.attend.form.tensors, taken)
        by_strength = functools.partial(toward_rows, slot=slot) if slot.partial else None
        return self.attend.bind(own, by_strength)(query, key, value, inside)


@dataclass(frozen=True, slots=True)
class At:
    """A family at a site of a host: the slot that says what rows have there, and the placement that stands for all."""

    slot: Slot
    family: Family
    placement: Placement

    def sources(self, deltas: Deltas) -> dict[str, Source]:
        """Return where the tensors are, for all deltas of the family, by own name."""
        site = site_key(self.placement)
        return {spec.name: Source(self.family, site, spec.name, deltas) for spec in self.placement.planned.tensors}


def attend_rows(builder: ProgramBuilder, host: str, given: Sequence[At]) -> Forward:
    """Build the forward of an attention module for slots of deltas that work inside it, in order of application."""
    hooks = []
    for place in given:
        placement = place.placement
        method, params, site = methods()[placement.method], placement.planned.params, placement.planned.site
        names, compute, simpler = tuple(s.name for s in placement.planned.tensors), None, method.simpler(params)
        if simpler is not None:  # once a delta, not once a row
            kind, settings = simpler
            compute = _simplified(placement)
            method, params = methods()[kind], methods()[kind].Params(**settings)
            names = tuple(spec.name for spec in method.tensors(site, params))
        table = Table(place.slot, place.sources(builder.deltas), compute)
        hooks.append(AttendRows(Attend(method, params, form_of(site, names)), table))
    return functools.partial(Lowered(builder.modules[host], (), hooks=tuple(hooks)), ())


def put_prompts_in_front(
    builder: ProgramBuilder, hosts: Mapping[str, Sequence[At]], made: Mapping[str, Forward]
) -> dict[str, Forward]:
    """Build the forwards that put virtual tokens in front of rows, around those that are `made` already, by host."""
    found: dict[str, Forward] = {}

    def so_far(fqn: str) -> Forward:
        return found.get(fqn) or made.get(fqn) or builder.own_forward(fqn)

    for host, given in hosts.items():
        prompts = [place for place in given if place.placement.virtual_tokens]
        if not prompts:
            continue
        entrance = prompts[0].placement.planned.site.row.entrance
        assert entrance is not None
        leading = [place.slot for place in prompts if place.placement.leads]
        front = RowFront([(place.slot, place.placement.virtual_tokens) for place in prompts], leading)
        tables = [
            Table(place.slot, place.sources(builder.deltas), _virtual_rows(builder, place.placement))
            for place in prompts
        ]
        found[host] = EmbeddedRows(so_far(host), front, tables)
        fqn, follower = entrance.fqn, entrance.follower
        module, own = builder.modules[fqn], builder.own_forward(fqn)
        numbering = None if follower is not None else numbering_of(module, own)
        found[fqn] = PromptedRows(module, so_far(fqn), builder.modules[host], front, numbering)
        if follower is not None:
            found[follower] = FollowingRows(builder.modules[follower], so_far(follower), front)
    return found


def put_streams_around(
    builder: ProgramBuilder, hosts: Mapping[str, Sequence[At]], made: Mapping[str, Forward]
) -> dict[str, Forward]:
    """Build the forwards that keep what enters them for deltas elsewhere, around those that are `made` already."""
    placed = {host: [place.placement for place in given] for host, given in hosts.items()}
    return tap(builder.streams.at(placed), builder.modules, lambda fqn: made.get(fqn) or builder.own_forward(fqn))


def touched(builder: ProgramBuilder, names: Iterable[str]) -> set[str]:
    """Return the FQNs of the modules whose forwards change while these deltas are attached."""
    found: set[str] = set()
    for name in names:
        for host, placements in builder.placements[name].items():
            found.add(host)
            entering = [v.planned.site.row.entrance for v in placements if v.virtual_tokens]
            found.update(fqn for e in entering if e is not None for fqn in (e.fqn, e.follower) if fqn is not None)
            read = (v.planned.site.stream for v in placements)
            found.update(fqn for stream in read if stream is not None for fqn in (stream, ""))
            told = [v.planned.site.row.positions for v in placements if v.counted_tokens]
            found.update(fqn for t in told if t is not None for fqn in t.takers)
    return found


def _simplified(placement: Placement) -> Callable[[Mapping[str, Tensor], str | None], tuple[Tensor, ...]]:
    method, params, site = methods()[placement.method], placement.planned.params, placement.planned.site

    def compute(own: Mapping[str, Tensor], _: str | None) -> tuple[Tensor, ...]:
        return tuple(method.simplified(site, params, DeltaTensors(tuple(own), tuple(own.values()))).values())

    return compute


def _virtual_rows(
    builder: ProgramBuilder, placement: Placement
) -> Callable[[Mapping[str, Tensor], str | None], tuple[Tensor, ...]]:
    """Return what computes the embeddings of one delta's virtual tokens, `[tokens, width]`, by the method's formula."""
    method, params, site = methods()[placement.method], placement.planned.params, placement.planned.site
    form, tokens = form_of(site, tuple(spec.name for spec in placement.planned.tensors)), placement.virtual_tokens
    probability = method.dropout(params)
    width = site.row.out_features
    assert width is not None

    def compute(own: Mapping[str, Tensor], name: str | None) -> tuple[Tensor, ...]:
        like = next(iter(own.values()))
        given: Any = DeltaTensors(tuple(own), tuple(own.values()))
        deltas, name = builder.deltas, name or placement.delta
        given.dropout = deltas[name].dropout(probability) if probability else lambda value: value
        ids = -1 - torch.arange(tokens, device=like.device)[None]
        return (method.apply(form, params, given, ids, lambda x: like.new_zeros(*x.shape, width))[0],)

    return compute
