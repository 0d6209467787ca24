"""DeLoRA of PEFT: normalised directions and a learned bound."""

from __future__ import annotations

from operator import attrgetter
from typing import TYPE_CHECKING, Any

from deltaspec.formats.incoming import IncomingSite
from deltaspec.formats.outgoing import Outgoing, Part
from deltaspec.formats.peft.factors import Update
from deltaspec.formats.peft.single import Single, most
from deltaspec.formats.peft.sites import differs, found_modules, lacks, overrides
from deltaspec.formats.peft.targets import by_pattern, ranks_of

if TYPE_CHECKING:
    from torch import Tensor

    from deltaspec.formats.peft.adapter import Adapter

METHODS = frozenset({"delora"})
"""Methods that are written so."""
_NAMES = {"delora_A": "down", "delora_B": "up", "delora_lambda": "boundary", "delora_w_norm": "norm"}


def read(adapter: Adapter) -> None:
    """Add the delta of a DeLoRA adapter."""
    rank, ranks = adapter.options.whole("r", 8, 1), ranks_of(adapter)
    params: dict[str, Any] = {"rank": rank, "init": "zeros" if adapter.options.flag("init_weights", True) else "random"}
    bound = adapter.options.number("delora_lambda", 15)
    adapter.ignore("lambda_pattern")  # where the bounds started
    if 0 < bound <= 1e6:
        params["boundary"] = bound
    if dropout := adapter.options.number("module_dropout", 0.0):
        params["dropout"] = dropout
    sites = []
    for found in found_modules(adapter, _NAMES, {"boundary": 1, "norm": 1}):
        own = {"rank": by_pattern(found.module, ranks, rank)}
        if lacks(adapter, found, ("down", "up", "boundary")):
            continue
        if differs(adapter, found, "r", own["rank"], found.tensors["down"].shape[0]):
            continue
        sites.append(IncomingSite(found.fqn, found.tensors, overrides(params, own)))
    adapter.add("delora", params, sites)


def fits(part: Part) -> bool:
    """Return whether PEFT's own type has a form for a part: it subtracts no start."""
    return bool(part.params.init != "kept")


def write(out: Outgoing) -> None:
    """Write a DeLoRA adapter."""
    single = Single(out, "DELORA", "delora", ("Linear",))
    for name, ours in (
        ("delora_A", "down"),
        ("delora_B", "up"),
        ("delora_lambda", "boundary"),
        ("delora_w_norm", "norm"),
    ):
        single.put(name, attrgetter(f"own.{ours}"))
    single.patterned("r", "rank_pattern", lambda part: part.params.rank, 8)
    bound = most({fqn: part.params.boundary for fqn, part in single.parts.items()}, 15.0)
    single.finish(delora_lambda=bound, module_dropout=single.largest(lambda part: part.params.dropout))


def updates(part: Part) -> list[Update]:
    """Return the update as LoRA has it: less what it started as, where that is kept."""
    own = part.own
    found = [_update(own.down, own.up, own.boundary, own.norm, part.strength)]
    if part.params.init == "kept":
        found.append(_update(own.down_start, own.up_start, own.boundary_start, own.norm, -part.strength))
    return found


def _update(down: Tensor, up: Tensor, boundary: Tensor, norm: Tensor, strength: float) -> Update:
    factor = boundary / down.shape[0] / (down.norm(dim=1).clamp(min=1e-4) * up.norm(dim=0).clamp(min=1e-4))
    return Update(down * norm, up * factor, strength)
