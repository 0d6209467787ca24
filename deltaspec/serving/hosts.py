"""The regions of mixed batches: a host's forward in which every row has tensors of its own."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from deltaspec.backbone.stand_in import Swapped, no_gradient_of_padding
from deltaspec.deltas.strengths import Strengths
from deltaspec.diagnostics.findings import DeltaSpecError, Diagnostic
from deltaspec.graphs.links import like
from deltaspec.graphs.row_ops import align, rows_in, rows_out, take
from deltaspec.methods.registry import methods
from deltaspec.runtime.checkpointing import tensors_in
from deltaspec.runtime.forms import call_form
from deltaspec.runtime.lowering import Fold, Lowered
from deltaspec.runtime.placements import Placement, host_of
from deltaspec.runtime.program_builder import Given, ProgramBuilder
from deltaspec.runtime.sockets import Forward
from deltaspec.serving.binding import At, attend_rows, put_prompts_in_front, put_streams_around
from deltaspec.serving.families import Standing, placed_together, site_key
from deltaspec.serving.slots import Slot
from deltaspec.serving.sources import Dropout, Number


def bind_rows(builder: ProgramBuilder, host: str, given: Sequence[At]) -> Forward:
    """Build a host's forward for families, in order of application."""
    places = [place for place in given if not place.placement.virtual_tokens]
    if not places:
        return builder.own_forward(host)

    def of_rows(place: At) -> Given:
        def values(placement: Placement, _: list[Tensor]) -> tuple[list[Any], list[Any]]:
            family, slot, site = place.family, place.slot, site_key(placement)
            sources = list(place.sources(builder.deltas).values())
            if placement.lowered or methods()[placement.method].attends:
                return sources, [slot]
            at = family.at(site)
            more: list[Any] = [Number(family, site, number) for number in range(len(at.factors))]
            if at.drops:
                more.append(Dropout(slot, family, site, builder.deltas))
            return [*sources, *more], [slot]

        return values

    placements = [place.placement for place in places]
    sorted_out = builder.sort_out(host, ((place.placement, of_rows(place)) for place in places), per_row=True)
    frozen, module = host in builder.statistics, builder.modules[host]
    if sorted_out.folds:
        if not all(_is_simple(builder, placement) for placement in placements if placement.lowered):
            return HostRows(builder, host, [place.slot for place in given])
        base: Any = FoldedRows(module, sorted_out.folds, frozen)
    elif sorted_out.attends:
        attending = {id(placement) for placement, _, _ in sorted_out.attends}
        base = attend_rows(builder, host, [place for place in places if id(place.placement) in attending])
    else:
        base = builder.host.frozen_statistics(host) if frozen else builder.own_forward(host)
    return builder.bind_region(host, placements, sorted_out, base)[0]


def at_hosts(builder: ProgramBuilder, standing: Standing, slots: Sequence[Slot]) -> tuple[dict[str, list[At]], int]:
    """Return what stands at each host, in order of application, and how many slots that takes."""
    first, hosts = 0, dict[str, list[At]]()
    for place, names in standing:
        lines = dict(zip(place.lines, slots[first:], strict=False))
        first += len(lines)
        for host, placements in placed_together(builder.placements, names).items():
            here = (At(lines[place.line(site)], place.family, placement) for site, placement in placements.items())
            hosts.setdefault(host, []).extend(here)
    return hosts, first


def bind_hosts(builder: ProgramBuilder, hosts: Mapping[str, Sequence[At]]) -> dict[str, Forward]:
    """Build the forwards of all modules that rows change."""
    made = {host: bind_rows(builder, host, here) for host, here in hosts.items()}
    made |= put_streams_around(builder, hosts, made)
    made |= put_prompts_in_front(builder, hosts, made)
    for fqn in builder.statistics:
        made.setdefault(fqn, builder.host.frozen_statistics(fqn))
    return made


class HostRows:
    """A host that reads weights without calling their modules: run once a set of deltas, each row taking its own.

    Such a host takes and gives what it likes, so nothing in it can be batched by row; its outputs can be told apart.
    """

    def __init__(self, builder: ProgramBuilder, host: str, slots: Sequence[Slot]) -> None:
        self._builder, self._host = builder, host
        self._slots = list(dict.fromkeys(slots))
        self._forwards: dict[tuple[str, ...], Forward] = {}

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the host. Raises DeltaSpecError (DS442) where its outputs do not tell rows apart."""
        if torch.compiler.is_compiling():
            raise RuntimeError(f"deltaspec DS444: {self._host} reads weights without calling their modules, "
                               "so what its rows are under cannot be data in a compiled graph")  # fmt: skip
        if not all(map(_is_data, (*args, *kwargs.values()))):
            message = f"{self._host or 'the model'} reads weights around their modules, so it runs once a delta; "
            message += "but it may write a cache"
            hint = "pass use_cache=False, or run these rows one delta at a time"
            raise DeltaSpecError([Diagnostic("DS442", message, suggestion=hint)])
        rows = list(zip(*(slot.assigned for slot in self._slots), strict=True))
        size, output = self._slots[0].batch.size, None
        for chosen in dict.fromkeys(rows):
            own = dict.fromkeys(entry for entry in chosen if entry is not None)  # its sites may be in several slots
            found = self._forward(list(own))(*args, **kwargs)
            places = [row == chosen for row in rows for _ in range(size // len(rows))]
            output = found if output is None else _put_rows(output, found, torch.tensor(places, device="cpu"))
        if output is None or not any(tensor.shape[:1] == (size,) for tensor in tensors_in(output)):
            message = f"nothing that {self._host or 'the model'} gives has the {size} rows of the batch as first "
            message += "dimension"
            hint = "run these rows one delta at a time: with c.only(name)"
            raise DeltaSpecError([Diagnostic("DS442", message, suggestion=hint)])
        return output

    def _forward(self, chosen: list[tuple[str, float]]) -> Forward:
        """Return the host's forward under deltas of these strengths."""
        builder, names = self._builder, tuple(name for name, _ in chosen)
        placements = [placement for name in names for placement in builder.placements[name].get(self._host, ())]
        if not placements:
            return builder.own_forward(self._host)
        part = {name: strength for name, strength in chosen if strength != 1.0}
        if part:
            return builder.bind(self._host, placements, part, Strengths(part))[0]
        if names not in self._forwards:
            self._forwards[names] = builder.bind(self._host, placements, ())[0]
        return self._forwards[names]


def _is_data(value: Any) -> bool:
    """Return whether a host can only read an argument; a cache it would write once a run."""
    if isinstance(value, Mapping):
        return all(map(_is_data, value.values()))
    if isinstance(value, tuple | list):
        return all(map(_is_data, value))
    return value is None or isinstance(value, Tensor | bool | int | float | str | torch.dtype | torch.device)


def _put_rows(output: Any, other: Any, chosen: Tensor) -> Any:
    """Take the chosen rows of tensors from another output of the same form."""
    if isinstance(output, Tensor):
        if output.shape[:1] != chosen.shape:
            return output
        return torch.where(align(chosen.to(output.device), output), other, output)
    if isinstance(output, Mapping):
        return type(output)(**{name: _put_rows(value, other[name], chosen) for name, value in output.items()})
    if isinstance(output, tuple | list):
        return type(output)(_put_rows(one, two, chosen) for one, two in zip(output, other, strict=True))
    return output


def refusals(builder: ProgramBuilder, name: str) -> list[Diagnostic]:
    """Return why a delta cannot be under single rows of a batch (DS441); empty where it can."""
    found = []
    for placement in builder.placements.of(name):
        if reason := _refusal(builder, placement):
            message = f"delta {name!r} cannot be mixed row by row: {reason}"
            hint = f"run its rows apart, under c.only({name!r})"
            found.append(Diagnostic("DS441", message, suggestion=hint))
    return found[:1]


def _refusal(builder: ProgramBuilder, placement: Placement) -> str | None:
    if not methods()[placement.method].promises.per_row:
        return f"{placement.method} is not usable for single rows"
    if placement.virtual_tokens and placement.stays:
        return "what the model gives has the positions of its prompt, too, and rows of one batch are equally long"
    if placement.counted_tokens:
        return "it takes positions in front of the tokens, and rows of one batch have theirs in common"
    site = placement.planned.site
    kind = type(builder.modules[host_of(site)])
    if methods()[placement.method].substitutes(site, placement.planned.params):
        if call_form(kind, site)[0] is None:
            return f"it runs {site.fqn} on other weights, and that is called with more than the hidden state"
        if site.row.packed is not None:
            return f"it runs {site.fqn} on other weights, and those are kept as {site.row.packed.name} codes"
    if any(spec.buffer and spec.name.startswith("running_") for spec in placement.planned.tensors):
        return f"it has statistics of its own for {site.fqn}, which are those of a whole batch"
    if fqn := _sequence_first(builder, site.row.fqn):
        above = type(builder.modules[fqn]).__name__
        return f"{fqn or 'the model'} ({above}) takes the batch as its second dimension (batch_first=False)"
    return None


def _is_simple(builder: ProgramBuilder, placement: Placement) -> bool:
    """Return whether a lowered site is its own host, a module that is given the hidden state alone."""
    site = placement.planned.site
    itself = site.host in (None, site.row.fqn) and site.kind != "other" and site.row.packed is None
    return itself and call_form(type(builder.modules[host_of(site)]), site)[0] is not None


def _sequence_first(builder: ProgramBuilder, fqn: str) -> str | None:
    """Return the module at or above a site that has positions first and rows second."""
    names = [fqn]
    while names[-1]:
        names.append(names[-1].rpartition(".")[0])
    return next((n for n in names if getattr(builder.modules[n], "batch_first", True) is False), None)


class FoldedRows:
    """The own forward of a module of one argument, each row with parameters of its own, computed at each call."""

    def __init__(self, module: nn.Module, folds: Sequence[tuple[Placement, Fold, list[Any]]], frozen: bool) -> None:
        """Each fold comes with the sources of its tensors, and its slot."""
        self.module, self.given = module, [(values[:-1], values[-1]) for _, _, values in folds]
        self.lowered = Lowered(module, tuple(fold for _, fold, _ in folds), frozen)

    def __call__(self, x: Tensor) -> Tensor:
        """Run the module."""
        entering = rows_in(self.given[0][1], x)
        tensors: list[Tensor] = []
        for sources, slot in self.given:
            tensors += (take(slot, source, entering, False) for source in sources)
            tensors.append(slot.grown("strength", entering.shape[0]))
        # Where tokens were given their rows, a row by itself is what the module expects; else it is one of a batch.
        one = functools.partial(self._one, alone=entering.dim() == x.dim())
        leaving: Tensor = torch.vmap(one, randomness="different")(entering, tuple(tensors))
        if torch.is_autocast_enabled(x.device.type):  # under vmap a bias is added by itself, and stays wide
            leaving = like(leaving, Swapped(self.module)({}, x[:0]))
        return rows_out(x, leaving) if x.is_floating_point() else leaving

    def _one(self, x: Tensor, tensors: tuple[Tensor, ...], *, alone: bool) -> Tensor:
        leaving = self.lowered(tensors, x.unsqueeze(0) if alone else x)
        if not isinstance(leaving, Tensor):
            kind = type(self.module).__name__
            message = f"a {kind} whose weight changes row by row gives a {type(leaving).__name__}, and no hidden state"
            hint = "run its rows one delta at a time: with c.only(name)"
            raise DeltaSpecError([Diagnostic("DS442", message, suggestion=hint)])
        return no_gradient_of_padding(self.module, x, leaving.squeeze(0) if alone else leaving)
