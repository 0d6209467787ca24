"""Attention in a mixed batch: keys and values of each row's own delta, seen by that row alone."""

from __future__ import annotations

import functools
from typing import Any

from torch import Tensor

from deltaspec.backbone.attention import Attention
from deltaspec.graphs.row_ops import rows_in, toward_rows
from deltaspec.methods.declarations import DeltaTensors
from deltaspec.runtime.lowering import Attend
from deltaspec.serving.slots import Table


class AttendRows:
    """A hook into an attention function, of the deltas of one slot."""

    def __init__(self, attend: Attend, table: Table) -> None:
        self.attend, self.table = attend, table

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, base: Attention) -> Any:
        """Compute attention, by each row's strength."""
        slot, size = self.table.slot, query.shape[0]
        rows_in(slot, query)
        if slot.empty:
            return base(query, key, value)
        present = slot.grown("index", size) > 0

        def inside(q: Tensor, k: Tensor, v: Tensor) -> Any:
            return base(q, k, v, present)

        own = DeltaTensors(self.attend.form.tensors, self.table.take(size))
        by_strength = functools.partial(toward_rows, slot=slot) if slot.partial else None
        return self.attend.bind(own, by_strength)(query, key, value, inside)
