"""Trainable tokens of PEFT: rows of embedding tables."""

from __future__ import annotations

from typing import TYPE_CHECKING

from deltaspec.formats.peft.beside import add_tokens
from deltaspec.formats.peft.sites import differs, found_modules

if TYPE_CHECKING:
    from deltaspec.formats.peft.adapter import Adapter


def read(adapter: Adapter) -> None:
    """Add a delta for each table: a delta of ours has one list of tokens."""
    adapter.ignore("init_weights")
    ids = adapter.option("token_indices") or []
    found = found_modules(adapter, {"trainable_tokens_delta": "weight"})
    for at in found:
        rows = at.tensors["weight"]
        if not differs(adapter, at, "the number of token_indices", len(ids), rows.shape[0]):
            add_tokens(adapter, at.fqn, ids, rows, "" if len(found) == 1 else at.fqn.replace(".", "-"))
