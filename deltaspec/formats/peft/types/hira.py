"""HiRA of PEFT: a low-rank factor of each entry of a weight."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from deltaspec.formats.incoming import IncomingSite
from deltaspec.formats.peft.sites import differs, found_modules, lacks, overrides
from deltaspec.formats.peft.targets import by_pattern

if TYPE_CHECKING:
    from deltaspec.formats.peft.adapter import Adapter

_NAMES = {"hira_A": "down", "hira_B": "up", "hira_embedding_A": "down", "hira_embedding_B": "up"}


def read(adapter: Adapter) -> None:
    """Add the delta of a HiRA adapter."""
    adapter.ignore("fan_in_fan_out")
    rank, ranks = adapter.option("r", 32), adapter.option("rank_pattern") or {}
    params: dict[str, Any] = {"rank": rank}
    if adapter.option("init_weights") == "gaussian":
        params["init"] = "normal"
    if dropout := adapter.option("hira_dropout", 0.0):
        params["dropout"] = float(dropout)
    sites, ignored = [], False
    for found in found_modules(adapter, _NAMES, {"down": None, "up": None}):
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
