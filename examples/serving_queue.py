"""A queue of requests in front of one server, and ways to serve it.

The model: requests come one after another, at times that are drawn beforehand; a server that is free takes from those
that wait, runs them as one batch, and answers all of them when it is done. Time is simulated, but for how long each
batch takes: that is measured. So every way of serving gets the same requests at the same times.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence


@dataclass(frozen=True, slots=True)
class Request:
    """One text for one task."""

    task: str
    ids: Tensor
    """Token ids, `[tokens]`."""
    label: int


@dataclass(frozen=True, slots=True)
class Way:
    """One way of serving."""

    name: str
    choose: Callable[[Sequence[Request]], list[int]]
    """Which of the waiting requests, the oldest first, go into the next batch: their places."""
    compute: Callable[[Sequence[Request]], Tensor]
    """The logits of a batch, `[requests, classes]`."""
    models: tuple[nn.Module, ...]
    """What has to be in memory."""


@dataclass(frozen=True, slots=True)
class Served:
    """What came of a stream of requests."""

    logits: Tensor
    """`[requests, classes]`, in the order in which the requests came."""
    latencies: Tensor
    """Seconds from a request's coming to its answer, `[requests]`."""
    busy: float
    """Seconds of computing."""
    batches: int


def oldest(size: int) -> Callable[[Sequence[Request]], list[int]]:
    """Choose those that wait for longest, of whatever task."""
    return lambda waiting: list(range(min(size, len(waiting))))


def same_task(size: int) -> Callable[[Sequence[Request]], list[int]]:
    """Choose the one that waits for longest, and others of its task."""
    return lambda waiting: [i for i, request in enumerate(waiting) if request.task == waiting[0].task][:size]


def pad(texts: Sequence[Tensor]) -> dict[str, Tensor]:
    """Put texts into one batch: `input_ids` and `attention_mask`, `[texts, tokens]`."""
    ids = pad_sequence(list(texts), batch_first=True)  # BERT's [PAD] is 0
    mask = pad_sequence([torch.ones_like(text) for text in texts], batch_first=True)
    return {"input_ids": ids, "attention_mask": mask}


@torch.no_grad()
def serve(
    way: Way,
    requests: Sequence[Request],
    arrivals: Sequence[float],
    clock: Callable[[], float] = time.perf_counter,
    progress: Callable[[int], None] = lambda answered: None,
) -> Served:
    """Serve a stream; `arrivals` are in seconds and rise. `clock` measures how long a batch takes."""
    coming, waiting = deque(range(len(requests))), list[int]()
    answers, latencies = [torch.empty(0)] * len(requests), [0.0] * len(requests)
    now, busy, batches = 0.0, 0.0, 0
    while coming or waiting:
        if not waiting:
            now = max(now, arrivals[coming[0]])
        while coming and arrivals[coming[0]] <= now:
            waiting.append(coming.popleft())
        batch = [waiting[place] for place in way.choose([requests[number] for number in waiting])]
        started = clock()
        logits = way.compute([requests[number] for number in batch])
        took = clock() - started
        now, busy, batches = now + took, busy + took, batches + 1
        for number, row in zip(batch, logits, strict=True):
            answers[number], latencies[number] = row, now - arrivals[number]
        taken = set(batch)
        waiting = [number for number in waiting if number not in taken]
        progress(len(batch))
    return Served(torch.stack(answers), torch.tensor(latencies), busy, batches)


def poisson(count: int, rate: float, seed: int) -> list[float]:
    """Draw when requests come, in seconds: independent of each other, `rate` a second."""
    gaps = torch.empty(count, dtype=torch.float64).exponential_(rate, generator=torch.Generator().manual_seed(seed))
    return gaps.cumsum(0).tolist()


def weight_bytes(models: Iterable[nn.Module]) -> int:
    """Add up the memory of all weights and buffers; what is shared counts once."""
    tensors = (tensor for model in models for tensor in (*model.parameters(), *model.buffers()))
    storages = {storage.data_ptr(): storage.nbytes() for storage in (t.untyped_storage() for t in tensors)}
    return sum(storages.values())
