"""Trainable tokens of PEFT: rows of embedding tables."""

from __future__ import annotations

from typing import TYPE_CHECKING

from deltaspec.formats.peft.beside import add_tokens
from deltaspec.formats.peft.sites import differs, found_modules

if TYPE_CHECKING:
    from deltaspec.formats.peft.adapter import Adapter


def read(adapter: Adapter) -> None:
    """Add a delta for each table: a delta of ours has one list of tokens.

    Tables that share a weight come once: PEFT saves the same rows at each of them.
    """
    adapter.ignore("init_weights")
    ids = adapter.option("token_indices") or []
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
