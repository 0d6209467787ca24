"""DeLoRA of PEFT: normalised directions and a learned bound."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from deltaspec.formats.incoming import IncomingSite
from deltaspec.formats.peft.sites import differs, found_modules, lacks, overrides
from deltaspec.formats.peft.targets import by_pattern

if TYPE_CHECKING:
    from deltaspec.formats.peft.adapter import Adapter

_NAMES = {"delora_A": "down", "delora_B": "up", "delora_lambda": "boundary", "delora_w_norm": "norm"}


def read(adapter: Adapter) -> None:
    """Add the delta of a DeLoRA adapter."""
    rank, ranks = adapter.option("r", 8), adapter.option("rank_pattern") or {}
    params: dict[str, Any] = {"rank": rank, "init": "zeros" if adapter.option("init_weights", True) else "random"}
    bound = adapter.option("delora_lambda", 15)
    adapter.ignore("lambda_pattern")  # where the bounds started
    if 0 < bound <= 1e6:
        params["boundary"] = float(bound)
    if dropout := adapter.option("module_dropout", 0.0):
        params["dropout"] = float(dropout)
    sites = []
    for found in found_modules(adapter, _NAMES, {"boundary": 1, "norm": 1}):
        own = {"rank": by_pattern(found.module, ranks, rank)}
        if lacks(adapter, found, ("down", "up", "boundary")):
            continue
        if differs(adapter, found, "r", own["rank"], found.tensors["down"].shape[0]):
            continue
        sites.append(IncomingSite(found.fqn, found.tensors, overrides(params, own)))
    adapter.add("delora", params, sites)
