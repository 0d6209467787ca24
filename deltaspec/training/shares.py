"""What each job has in a batch: its loss, the mean over its own rows, be they in one process or in several."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import isfinite, nan
from typing import Any

import torch
from torch import Tensor, distributed

from deltaspec.training.losses import Loss, items_of
from deltaspec.training.processes import summed


@dataclass(slots=True)
class Share:
    """What one job has in a batch of this process."""

    outputs: Any
    loss: Tensor
    rows: int
    items: int
    """What the loss is the mean over: labels, or rows."""

    @classmethod
    def of(cls, loss: Loss, outputs: Any, batch: Any, rows: int) -> Share:
        """Return the share of a job with these rows."""
        return cls(outputs, loss(outputs, batch), rows, items_of(loss, batch, rows))


def alone(shares: Mapping[str, Share]) -> dict[str, tuple[float, int]]:
    """Return loss and rows of each job, where there is one process."""
    return {name: (float(share.loss.detach()), share.rows) for name, share in shares.items()}


def over_all(shares: Mapping[str, Share], names: Sequence[str], device: torch.device) -> dict[str, tuple[float, int]]:
    """Return loss and rows of each of these jobs over all processes, where there are any; every process calls this.

    The losses of this process are weighed so that the mean of the processes' gradients is the gradient of that loss.
    It is not a number where one process has one that is not finite.
    """
    for share in shares.values():
        if not share.items:  # the mean over nothing
            share.loss = nothing_of(share.outputs)
    rows = []
    for name in names:
        own = shares.get(name)
        value = 0.0 if own is None else float(own.loss.detach())
        counts = (0, 0) if own is None else (own.rows, own.items)
        rows.append([*counts, value * counts[1] if isfinite(value) else 0.0, not isfinite(value)])
    found = {}
    for name, (count, items, value, failed) in zip(names, summed(rows, device), strict=True):
        if items:
            found[name] = (nan if failed else value / items, int(count))
            if name in shares:
                shares[name].loss = shares[name].loss * (shares[name].items * distributed.get_world_size() / items)
    return found


def nothing_of(outputs: Any) -> Tensor:
    """Return nought, computed from all outputs that have gradients."""
    values = outputs.values() if isinstance(outputs, Mapping) else outputs
    each = [values] if isinstance(values, Tensor) else values
    tensors = [value for value in each if isinstance(value, Tensor) and value.requires_grad]
    return torch.stack([tensor.sum() * 0 for tensor in tensors]).sum()
