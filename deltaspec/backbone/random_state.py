"""torch's random state, kept while something of a model runs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor


@contextmanager
def random_state_kept(tensors: Iterable[Tensor] = ()) -> Iterator[None]:
    """Put the random state back at the end: the CPU's, and that of the devices on which these tensors are."""
    places: dict[str, set[int]] = {}
    for device in {tensor.device for tensor in tensors}:
        if device.type not in ("cpu", "meta"):
            places.setdefault(device.type, set()).add(device.index or 0)
    with ExitStack() as forks:
        forks.enter_context(torch.random.fork_rng(devices=[]))
        for kind, indices in sorted(places.items()):
            forks.enter_context(torch.random.fork_rng(devices=sorted(indices), device_type=kind))
        yield


@contextmanager
def seeded_on_cpu(value: int) -> Iterator[None]:
    """Fix the random state of the CPU inside, and put it back. `torch.manual_seed` would set that of all devices."""
    with random_state_kept():
        torch.default_generator.manual_seed(value)
        yield
