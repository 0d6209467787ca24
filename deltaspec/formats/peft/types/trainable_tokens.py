"""Trainable tokens of PEFT: rows of embedding tables."""

from __future__ import annotations

from typing import TYPE_CHECKING

from deltaspec.formats.outgoing import Outgoing, Part
from deltaspec.formats.peft.aside import PREFIX
from deltaspec.formats.peft.beside import add_tokens
from deltaspec.formats.peft.single import name_modules, unplaced
from deltaspec.formats.peft.sites import differs, found_modules

if TYPE_CHECKING:
    from deltaspec.formats.peft.adapter import Adapter

METHODS = frozenset({"trainable_tokens"})
"""Methods that are written so."""


def read(adapter: Adapter) -> None:
    """Add a delta for each table: a delta of ours has one list of tokens.

    Tables that share a weight come once: PEFT saves the same rows at each of them.
    """
    adapter.options.start("init_weights", True)
    ids = [] if adapter.options.get("token_indices") is None else adapter.options.items("token_indices", (), int)
    tables = adapter.base.rows

    def group(fqn: str) -> str:
        weight = next(p for p in tables[fqn].parameters if p.name == "weight")
        return min((weight.fqn, *weight.tied))

    def is_tied(fqn: str) -> bool:
        return any(parameter.tied for parameter in tables[fqn].parameters)

    every = found_modules(adapter, {"trainable_tokens_delta": "weight"}, untargeted=is_tied)
    found = list({group(at.fqn): at for at in reversed(every)}.values())
    for at in reversed(found):
        rows = at.tensors["weight"]
        if not differs(adapter, at, "the number of token_indices", len(ids), rows.shape[0]):
            add_tokens(adapter, at.fqn, ids, rows, "" if len(found) == 1 else at.fqn.replace(".", "-"))


def fits_together(parts: list[Part]) -> bool:
    """Return whether one list of tokens of one table is all that is there."""
    return len({part.delta for part in parts}) == 1 and all(
        part.strength == 1 and not any(parameter.tied for parameter in part.at.site.row.parameters) for part in parts
    )


def write(out: Outgoing) -> None:
    """Write the rows of one table."""
    found = out.take(lambda part: part.method in METHODS)
    for fqn, parts in found.items():
        if reason := unplaced(out, parts[0]):
            out.refuse(parts, reason)
        out.config["token_indices"] = list(parts[0].params.token_ids)
        out.tensors[f"{PREFIX}{fqn}.trainable_tokens_delta"] = parts[0].own.weight
    name_modules(out, list(found))
    out.config["peft_type"] = "TRAINABLE_TOKENS"
