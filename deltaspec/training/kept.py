"""What a job keeps of its evaluations: the tensors of its deltas, and which one is better."""

from __future__ import annotations

from collections.abc import Mapping
from math import isfinite
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from deltaspec.backbone.sharded import sharded_as

if TYPE_CHECKING:
    from deltaspec.deltas.modules import Delta

Deltas = Mapping[str, "Delta"]


def tensors_of(deltas: Deltas) -> dict[str, Tensor]:
    """Return the tensors of deltas, buffers included, by delta and storage key."""
    return {f"{name}\n{key}": tensor for name, delta in deltas.items() for key, tensor in delta.tensors()}


def copies_of(deltas: Deltas) -> dict[str, Tensor]:
    """Return copies of them."""
    return {key: tensor.detach().clone() for key, tensor in tensors_of(deltas).items()}


@torch.no_grad()
def put_back(deltas: Deltas, values: Mapping[str, Tensor]) -> None:
    """Give deltas these values."""
    for key, tensor in tensors_of(deltas).items():
        tensor.copy_(sharded_as(tensor, values[key]))


def is_better(value: float, best: float | None, by: str) -> bool:
    """Return whether an evaluation is better than the best one, if there is one: by less loss, or more of a metric."""
    return isfinite(value) and (best is None or (value < best if by == "loss" else value > best))
