"""A job's batches: an endless stream in an order that its seed and the epoch decide, which can be taken up again."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from deltaspec.diagnostics.findings import DeltaSpecError, Diagnostic


class Stream:
    """The batches of one job, epoch after epoch.

    What a loader draws, it draws from torch's generator (or one of its own), which is seeded anew for each epoch and
    put back afterwards: so the order is a function of seed and epoch, whatever else draws numbers in between.
    """

    def __init__(self, name: str, data: Iterable[Any], seed: int) -> None:
        self.name, self.seed, self._data = name, seed, data
        self.epoch = self.taken = 0
        """Epoch, from 0, and batches that were taken of it."""
        self._iterator: Iterator[Any] | None = None
        self._state = torch.empty(0)

    def next(self) -> Any:
        """Return the next batch. Raises DeltaSpecError (DS383) where the data has none, or cannot be read again."""
        with _generator_kept():
            for _ in range(2):
                if self._iterator is None:
                    self._begin()
                else:
                    torch.default_generator.set_state(self._state)
                batch = next(self._iterator, _END)  # type: ignore[arg-type]
                if batch is not _END:
                    self.taken += 1
                    self._state = torch.default_generator.get_state()
                    return batch
                if not self.taken:
                    break
                self.epoch, self.taken, self._iterator = self.epoch + 1, 0, None
        message = f"the data of the job {self.name!r} has no {'more ' if self.epoch else ''}batches"
        hint = "give it what can be iterated anew each epoch (a list, a DataLoader), or fewer steps"
        raise DeltaSpecError([Diagnostic("DS383", message, "<jobs>", suggestion=hint)])

    def seek(self, epoch: int, taken: int) -> None:
        """Go to a place; what comes before it in the epoch is read, and passed by, when the next batch is asked for."""
        self.epoch, self.taken, self._iterator = epoch, taken, None

    def _begin(self) -> None:
        """Begin the epoch, at the batch behind those that were taken."""
        seed = epoch_seed(self.seed, self.epoch)
        torch.default_generator.manual_seed(seed)
        for generator in _own_generators(self._data):
            generator.manual_seed(seed)
        holders: list[Any] = [self._data, *(getattr(self._data, name, None) for name in ("sampler", "batch_sampler"))]
        for holder in holders:
            if hasattr(holder, "set_epoch"):  # a part of the data for each of several processes
                holder.set_epoch(self.epoch)
        self._iterator = iter(self._data)
        for _ in range(self.taken):
            next(self._iterator, None)


_END = object()


def epoch_seed(seed: int, epoch: int) -> int:
    """Return the seed of one epoch's order."""
    digest = hashlib.sha256(f"{seed}\0{epoch}".encode()).digest()
    return int.from_bytes(digest[:8], "big", signed=True)


@contextmanager
def _generator_kept() -> Iterator[None]:
    """Put torch's generator (of the CPU) back at the end."""
    state = torch.default_generator.get_state()
    try:
        yield
    finally:
        torch.default_generator.set_state(state)


def _own_generators(data: Any) -> list[torch.Generator]:
    """Return the generators that a loader and its samplers have of their own."""
    batches = getattr(data, "batch_sampler", None)
    holders = (data, getattr(data, "sampler", None), batches, getattr(batches, "sampler", None))
    found = [getattr(holder, "generator", None) for holder in holders]
    return [generator for generator in found if isinstance(generator, torch.Generator)]
