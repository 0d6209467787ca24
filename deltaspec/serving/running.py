"""A forward with rows: what it starts with, what is shown of it, and what it leaves behind."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from deltaspec.runtime.host import Host
from deltaspec.runtime.proving import watched
from deltaspec.runtime.shared import Shared
from deltaspec.runtime.sockets import Forward
from deltaspec.serving.assignment import Rows
from deltaspec.serving.dispatch import Batch, Kinds
from deltaspec.serving.slots import Slot
from deltaspec.serving.trial import rows_lead


class Running:
    """The part of a mixer that forwards ask while they run: the batch, the rows of each slot."""

    def __init__(self, shared: Shared, host: Host) -> None:
        self._shared, self._host = shared, host
        self.batch = Batch()
        self.running: Kinds | None = None
        """Kinds of the rows of the forward that runs now; None where it has no rows."""
        self._slots: list[Slot] = []
        self._using: dict[Kinds, tuple[Slot, ...]] = {}
        """Slots of the rows of each kinds."""
        self._tried: set[str] = set()
        """Hosts that are given the rows of a batch along dimension 0."""
        self._shown: set[Kinds] = set()
        """Kinds all of whose hosts are in `_tried`."""

    def _provide(self, number: int) -> None:
        """Have at least so many slots."""
        self._slots += [Slot(place, self.batch) for place in range(len(self._slots), number)]

    def _try(
        self,
        kinds: Kinds,
        mixed: Mapping[str, Mapping[Kinds, Forward]],
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
    ) -> None:
        """Have it shown, once a host, that the rows are where they are looked for; on the call's inputs, if need be."""
        if kinds in self._shown:
            return
        modules = self._host.modules
        hosts = [host for host, known in mixed.items() if host and kinds in known and host not in self._tried]
        backbone = self._host.backbone
        if not hosts or rows_lead(backbone, {host: modules[host] for host in hosts}, backbone, args, kwargs):
            self._tried.update(hosts)
            self._shown.add(kinds)

    def _start(self, rows: Rows, args: tuple[Any, ...], kwargs: Mapping[str, Any], keep: bool = False) -> None:
        self.batch.begin(len(rows), args, kwargs)
        for slot in self._using[rows.kinds]:
            slot.fill(rows, keep)
        self.running = rows.kinds

    def _stop(self) -> None:
        # Others are clear already, but for those that an interrupt left; how many there are is no data in a graph.
        running = self.running if torch.compiler.is_compiling() else None
        for slot in self._slots if running is None else self._using[running]:
            slot.clear()
        self.running = None
        self.batch.rows = 0

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _note_displaced(self) -> None:
        """Have it known which slots have tensors of this call alone, before parts of the forward are compiled."""
        for slot in self._slots:
            slot.is_displaced(self._host.deltas)

    def proving(self, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Run the model, watched if nothing has shown yet that the rows' deltas are reached."""
        if torch.compiler.is_compiling() or not self._shared.unproven:
            return forward(*args, **kwargs)
        names = [name for slot in self._slots for name in slot.names]
        if self._shared.unproven.isdisjoint(names):
            return forward(*args, **kwargs)
        output, seen = watched(self._host.backbone, forward, *args, **kwargs)
        self._shared.prove_reached(seen, names)
        return output
