"""VeRA of PEFT: scales around one pair of random matrices, which each module takes a corner of."""

from __future__ import annotations

from functools import cache
from math import sqrt
from typing import TYPE_CHECKING, Any

import torch

from deltaspec.formats.incoming import IncomingSite
from deltaspec.formats.outgoing import Outgoing, Part
from deltaspec.formats.peft.factors import Update
from deltaspec.formats.peft.single import Single, most
from deltaspec.formats.peft.sites import Found, differs, found_modules, lacks

if TYPE_CHECKING:
    from torch import Tensor

    from deltaspec.formats.peft.adapter import Adapter

METHODS = frozenset({"vera"})
"""Methods that are written so."""


_NAMES = {"vera_lambda_d": "inner_scale", "vera_lambda_b": "outer_scale"}


def read(adapter: Adapter) -> None:
    """Add the delta of a VeRA adapter."""
    adapter.ignore("fan_in_fan_out")
    adapter.options.start("init_weights", True)
    rank = adapter.options.whole("r", 256, 1)
    params: dict[str, Any] = {"rank": rank}
    if dropout := adapter.options.number("vera_dropout", 0.0):
        params["dropout"] = dropout
    if (start := adapter.options.number("d_initial", 0.1)) > 0:
        params["initial_scale"] = start
    key, saved = (
        adapter.options.whole("projection_prng_key", 0, -(1 << 63)),
        adapter.options.flag("save_projection", True),
    )
    modules = [
        found
        for found in found_modules(adapter, _NAMES, {"inner_scale": 1, "outer_scale": 1})
        if not lacks(adapter, found, ("inner_scale", "outer_scale"))
        and not differs(adapter, found, "r", rank, found.tensors["inner_scale"].shape[0])
    ]
    if not modules:
        return
    projections = _projections(adapter, modules, rank, key, saved)
    if projections is None:
        return
    down, up = projections

    @cache
    def slice_of(of: str, width: int) -> Tensor:  # sites of one width share one tensor
        return (down[:, :width] if of == "down" else up[:width]).contiguous()

    sites = []
    for found in modules:
        assert found.row.in_features is not None and found.row.out_features is not None
        shared = {"down": slice_of("down", found.row.in_features), "up": slice_of("up", found.row.out_features)}
        sites.append(IncomingSite(found.fqn, {**found.tensors, **shared}))
    adapter.add("vera", params, sites)


def _projections(
    adapter: Adapter, modules: list[Found], rank: int, key: int, saved: bool
) -> tuple[Tensor, Tensor] | None:
    """Return the two matrices: those of the file, or, where it has none, those that PEFT draws from the same key."""
    taken = [
        adapter.take(prefix + name, "the projection that all modules share")
        for name in ("vera_A", "vera_B")
        for prefix in ("base_model.", "")
        if prefix + name in adapter.weights
    ]
    widest = [max((getattr(found.row, name) or 0 for found in modules), default=0)
              for name in ("in_features", "out_features")]  # fmt: skip
    shapes = ((rank, widest[0]), (widest[1], rank))
    if len(taken) == 2:
        down, up = taken
        assert down is not None and up is not None
        small = [list(held.shape) for held, least in zip((down, up), shapes, strict=True)
                 if held.dim() != 2 or any(a < b for a, b in zip(held.shape, least, strict=True))]  # fmt: skip
        if small:
            message = f"has projections of {small}, which are smaller than the modules they are for"
            adapter.find("DS543", message, "the adapter is for another model, or was cut", adapter.file)
            return None
        return down[:rank], up[:, :rank]
    if saved or taken:
        message = "save_projection is on, and vera_A or vera_B is missing" if saved else "has one of vera_A and vera_B"
        adapter.find("DS543", message, "the file was cut: save the adapter again", adapter.file)
        return None
    adapter.remark(
        f"its projections were not saved: they are drawn from projection_prng_key {key}, as PEFT does, for the modules "
        "that it has here"
    )
    generator = torch.Generator().manual_seed(key)
    made = []
    for shape in shapes:
        bound = sqrt(3) * (sqrt(2) / sqrt(shape[1]))  # as PEFT computes it, to the bit
        made.append(torch.empty(shape).uniform_(-bound, bound, generator=generator))
    return made[0], made[1]


def fits_together(parts: list[Part]) -> bool:
    """Return whether all modules take corners of one pair of matrices, and as many of its rows, as PEFT's do."""
    downs, ups = ({id(value): value for part in parts for value in (getattr(part.own, name),)}.values()
                  for name in ("down", "up"))  # fmt: skip
    wide, tall = max(downs, key=lambda value: value.shape[1]), max(ups, key=lambda value: value.shape[0])
    return all(
        value.shape[0] == wide.shape[0] and torch.equal(value, wide[:, : value.shape[1]]) for value in downs
    ) and all(value.shape[1] == tall.shape[1] and torch.equal(value, tall[: value.shape[0]]) for value in ups)


def write(out: Outgoing) -> None:
    """Write a VeRA adapter, its matrices with it."""
    single = Single(out, "VERA", "vera", ("Linear", "Conv1D"))
    rank = single.agreed("r", lambda part: part.params.rank, 256)
    start = most({fqn: part.params.initial_scale for fqn, part in single.parts.items()}, 0.1)
    single.put("vera_lambda_d", lambda part: part.own.inner_scale)
    single.put("vera_lambda_b", lambda part: part.own.outer_scale)
    if single.parts:
        parts = single.parts.values()
        out.tensors["base_model.vera_A"] = max((part.own.down for part in parts), key=lambda value: value.shape[1])
        out.tensors["base_model.vera_B"] = max((part.own.up for part in parts), key=lambda value: value.shape[0])
    dropout = single.largest(lambda part: part.params.dropout)
    single.finish(r=rank, d_initial=start, vera_dropout=dropout, save_projection=True)


def updates(part: Part) -> list[Update]:
    """Return the update as LoRA has it."""
    own = part.own
    return [Update(own.inner_scale[:, None] * own.down, own.outer_scale[:, None] * own.up, part.strength)]
