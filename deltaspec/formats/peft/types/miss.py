"""MiSS of PEFT: one small matrix shared by all shards of a weight."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from deltaspec.formats.incoming import IncomingSite
from deltaspec.formats.outgoing import Outgoing
from deltaspec.formats.peft.single import Single
from deltaspec.formats.peft.sites import differs, found_modules

if TYPE_CHECKING:
    from deltaspec.formats.peft.adapter import Adapter

METHODS = frozenset({"miss"})
"""Methods that are written so."""


def read(adapter: Adapter) -> None:
    """Add the delta of a MiSS adapter; what it computes is what its start was called."""
    start = adapter.options.start("init_weights", True, ("bat", "mini"))
    dropout = adapter.options.number("miss_dropout", 0.0)
    params: dict[str, Any] = {"rank": adapter.options.whole("r", 64, 1)}
    width = adapter.options.whole("mini_r", 1)
    if start in ("bat", "mini"):
        params["variant"] = start
    if start == "mini":
        params["width"] = width
    if dropout and start == "bat":
        adapter.remark(f"miss_dropout {dropout} was left out: PEFT never calls it where init_weights is bat")
    elif dropout:
        params["dropout"] = dropout
    modules = found_modules(adapter, {"miss_block": "shard"}, {"shard": 3 if start == "bat" else 2})
    adapter.add(
        "miss", params, [
            IncomingSite(at.fqn, at.tensors) for at in modules
            if not differs(adapter, at, "r", params["rank"], at.tensors["shard"].shape[1 if start == "bat" else 0])
        ],
    )  # fmt: skip


def write(out: Outgoing) -> None:
    """Write a MiSS adapter."""
    single = Single(out, "MISS", "miss", ("Linear",))
    rank = single.agreed("r", lambda part: part.params.rank, 64)
    variant = single.agreed("init_weights", lambda part: part.params.variant, "miss")
    width = single.agreed("mini_r", lambda part: part.params.width if variant == "mini" else 1, 1)
    single.put("miss_block", lambda part: part.own.shard)
    dropout = single.largest(lambda part: part.params.dropout)
    single.finish(r=rank, init_weights=True if variant == "miss" else variant, mini_r=width, miss_dropout=dropout)
