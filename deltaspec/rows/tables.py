"""What the deltas of one slot come to before a row has part in it: computed once a delta, then given to its rows."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from deltaspec.rows.slots import Slot, Source

Compute = Callable[[Mapping[str, Tensor], str | None], tuple[Tensor, ...]]
"""From one delta's tensors by own name, and its name (None in a compiled graph: it is data), to what is wanted."""


class Table:
    """Tensors of the deltas of a slot, or what is computed from those of each, for each row."""

    def __init__(self, slot: Slot, sources: Mapping[str, Source], compute: Compute | None = None) -> None:
        self.slot, self.sources, self.compute = slot, sources, compute

    def take(self, size: int) -> tuple[Tensor, ...]:
        """Give each row its delta's, `[size, …]`, or another row's where it has none."""
        slot, compute = self.slot, self.compute
        if compute is None:
            return tuple(source.take(slot, size, zeros=False) for source in self.sources.values())
        if torch.compiler.is_compiling():
            rows = {name: source.take(slot, size, zeros=False) for name, source in self.sources.items()}
            computed: tuple[Tensor, ...] = torch.vmap(lambda own: compute(own, None))(rows)
            return computed
        if not slot.names:  # only in the kinds for rows of other batches: nothing is to be computed
            own = {name: source.take(slot, 1, zeros=False)[0] for name, source in self.sources.items()}
            return tuple(value.expand(size, *value.shape) for value in compute(own, None))
        each = [compute({key: source.of(name) for key, source in self.sources.items()}, name) for name in slot.names]
        place = (slot.grown("local", size) - 1).clamp(min=0)
        return tuple(torch.stack(values).index_select(0, place) for values in zip(*each, strict=True))
