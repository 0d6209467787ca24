"""A job's batches: an endless stream in an order that its seed and the epoch decide, which can be taken up again."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

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
        self._read = False
        """Whether it has given a batch."""
        self._drawn: list[torch.Tensor] = []
        """States of the generators, behind what the last batch drew."""

    def next(self) -> Any:
        """Return the next batch. Raises DeltaSpecError (DS383) where the data has none, or cannot be read again."""
        generators = [torch.default_generator, *_own_generators(self._data)]
        with _kept(generators):
            for _ in range(2):
                if self._iterator is None:
                    if self._read and isinstance(self._data, Iterator):
                        break  # it goes on where it is, and not where this stream is
                    self._begin(generators)
                else:
                    for generator, state in zip(generators, self._drawn, strict=True):
                        generator.set_state(state)
                batch = next(self._iterator, _END)  # type: ignore[arg-type]
                if batch is not _END:
                    self.taken, self._read = self.taken + 1, True
                    self._drawn = [generator.get_state() for generator in generators]
                    return batch
                if not self.taken:
                    break
                self.epoch, self.taken, self._iterator = self.epoch + 1, 0, None
        message = f"the data of the job {self.name!r} has no {'more ' if self._read else ''}batches"
        hint = "give it what can be iterated anew each epoch (a list, a DataLoader), or fewer steps"
        raise DeltaSpecError([Diagnostic("DS383", message, "<jobs>", suggestion=hint)])

    def seek(self, epoch: int, taken: int) -> None:
        """Go to a place; what comes before it in the epoch is read, and passed by, when the next batch is asked for."""
        self.epoch, self.taken, self._iterator = epoch, taken, None

    def _begin(self, generators: Iterable[torch.Generator]) -> None:
        """Begin the epoch, at the batch behind those that were taken."""
        seed = epoch_seed(self.seed, self.epoch)
        for generator in generators:
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


def read_by_many(names: Sequence[str], data: Sequence[Iterable[Any] | None]) -> list[Diagnostic]:
    """Return findings (DS382) for what several jobs are given, and only one of them can read.

    That is an iterator, of which each would get other batches, and a loader whose workers stay: it begins anew for all.
    """
    readers: dict[int, list[str]] = {}
    for name, given in zip(names, data, strict=True):
        once = isinstance(given, Iterator) or (
            getattr(given, "persistent_workers", False) and getattr(given, "num_workers", 0)
        )
        if once:
            readers.setdefault(id(given), []).append(name)
    found = []
    for shared in readers.values():
        if len(shared) > 1:
            message = f"the jobs {' and '.join(map(repr, shared))} share data that can be read by one at a time"
            hint = "give them what can be iterated anew (a list, a DataLoader without persistent_workers), or one each"
            found.append(Diagnostic("DS382", message, "<jobs>", suggestion=hint))
    return found


@contextmanager
def _kept(generators: Sequence[torch.Generator]) -> Iterator[None]:
    """Put generators back at the end."""
    states = [generator.get_state() for generator in generators]
    try:
        yield
    finally:
        for generator, state in zip(generators, states, strict=True):
            generator.set_state(state)


def _own_generators(data: Any) -> list[torch.Generator]:
    """Return the generators that a loader and its samplers have of their own, by whatever name."""
    batches = getattr(data, "batch_sampler", None)
    holders = (data, getattr(data, "sampler", None), batches, getattr(batches, "sampler", None))
    found = (value for holder in holders for value in getattr(holder, "__dict__", {}).values())
    return list({id(value): value for value in found if isinstance(value, torch.Generator)}.values())


def moved_to(value: Any, device: torch.device) -> Any:
    """Return a batch on a device."""
    if isinstance(value, Tensor):
        return value.to(device, non_blocking=True)
    if isinstance(value, Mapping):
        return {key: moved_to(each, device) for key, each in value.items()}
    return type(value)(moved_to(each, device) for each in value) if type(value) in (tuple, list) else value
