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
    sites = []
    for found in found_modules(adapter, _NAMES):
        own = {"rank": by_pattern(found.module, ranks, rank)}
        if lacks(adapter, found, ("down", "up")):
            continue
        if differs(adapter, found, "r", own["rank"], found.tensors["down"].shape[0]):
            continue
        if found.row.kind == "embedding" and "dropout" in params:
            own["dropout"] = 0.0  # PEFT's layer of an embedding has one, and never calls it
        tensors = {"down": found.tensors["down"], "up": found.tensors["up"].flatten(1)}
        sites.append(IncomingSite(found.fqn, tensors, overrides(params, own)))
    adapter.add("hira", params, sites)
