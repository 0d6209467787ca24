"""HiRA of PEFT: a low-rank factor of each entry of a weight."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from deltaspec.formats.incoming import IncomingSite
from deltaspec.formats.outgoing import Outgoing, Part
from deltaspec.formats.peft.convolutions import ignored_padding, refuse_ignored_padding
from deltaspec.formats.peft.single import Single, left_out
from deltaspec.formats.peft.sites import differs, found_modules, lacks, overrides
from deltaspec.formats.peft.targets import by_pattern, ranks_of

if TYPE_CHECKING:
    from torch import Tensor

    from deltaspec.formats.peft.adapter import Adapter

METHODS = frozenset({"hira"})
"""Methods that are written so."""
_NAMES = {"hira_A": "down", "hira_B": "up", "hira_embedding_A": "down", "hira_embedding_B": "up"}


def read(adapter: Adapter) -> None:
    """Add the delta of a HiRA adapter."""
    adapter.ignore("fan_in_fan_out")
    rank, ranks = adapter.options.whole("r", 32, 1), ranks_of(adapter)
    params: dict[str, Any] = {"rank": rank}
    if adapter.options.start("init_weights", True, ("gaussian",), any_case=True) == "gaussian":
        params["init"] = "normal"
    if dropout := adapter.options.number("hira_dropout", 0.0):
        params["dropout"] = dropout
    sites, ignored = [], False
    modules = list(found_modules(adapter, _NAMES, {"down": None, "up": None}))
    refuse_ignored_padding(adapter, modules)
    for found in modules:
        if lacks(adapter, found, ("down", "up")):
            continue
        said, held = by_pattern(found.module, ranks, rank), found.tensors["down"].shape[0]
        if held != rank and differs(adapter, found, "r", said, held):
            continue
        ignored |= said != held
        own: dict[str, Any] = {"rank": held}
        if found.row.kind == "embedding" and "dropout" in params:
            own["dropout"] = 0.0  # PEFT's layer of an embedding has one, and never calls it
        tensors = {"down": found.tensors["down"], "up": found.tensors["up"].flatten(1)}
        sites.append(IncomingSite(found.fqn, tensors, overrides(params, own)))
    if ignored:
        adapter.remark("rank_pattern: PEFT does not look at it where it makes HiRA, and its file has tensors of r")
    adapter.add("hira", params, sites)


def write(out: Outgoing) -> None:
    """Write a HiRA adapter. All modules get the largest rank, filled with zeros: PEFT does not look at rank_pattern."""
    layers = ("Linear", "Conv1D", "Embedding", "Conv1d", "Conv2d", "Conv3d")
    single = Single(out, "HIRA", "hira", layers, biases=False)
    single.keep(lambda part: left_out(ignored_padding(out.base.model.get_submodule(part.fqn))))
    rank = max((part.params.rank for part in single.parts.values()), default=32)
    for theirs, ours in _NAMES.items():
        embedding = "embedding" in theirs
        single.put(
            theirs,
            lambda part, ours=ours, embedding=embedding: (  # type: ignore[misc]
                _tensor(part, ours, rank) if (part.at.site.kind == "embedding") == embedding else None
            ),
        )
    single.finish(r=rank, hira_dropout=single.largest(lambda part: getattr(part.params, "dropout", 0.0)))


def _tensor(part: Part, name: str, rank: int) -> Tensor:
    value: Tensor = getattr(part.own, name)
    lacking = rank - part.params.rank
    if name == "down":
        return torch.cat((value, value.new_zeros(lacking, *value.shape[1:])))
    value = torch.cat((value, value.new_zeros(value.shape[0], lacking)), 1)
    return value.reshape(*value.shape, *(1 for _ in part.own.down.shape[2:]))
