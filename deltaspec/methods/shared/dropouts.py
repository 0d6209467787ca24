"""Dropout of more than entries of an input: of an update's rows, of a whole update, of rotations.

A formula has one dropout, `t.dropout`. Given ones, it tells whether the model trains: `training` asks it once a
forward. What is dropped is drawn here then, by torch's own generator. The functions work on tensors, not on proxies:
formulas run them with `t.call`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field

if TYPE_CHECKING:
    from torch import Tensor

Probability = Annotated[float, Field(ge=0, lt=1)]


def training(t: Any, like: Any) -> Any:
    """Return a vector of one value that is 1 unless the model trains; `like` is any tensor of the delta."""
    return t.dropout(t.call(_one, like))


def drop_update(probe: Tensor, update: Tensor, rows: float, rescaled: bool, whole: float) -> Tensor:
    """Drop rows of a canonical update with one probability, and all of it with another, while training.

    `probe` comes from `training`. `rescaled`: the rows that stay are scaled so that their mean is that of all.
    """
    import torch

    trains = probe != 1
    if rows:
        kept = (torch.rand(update.shape[0], device=update.device) > rows).to(update.dtype)
        kept = torch.where(trains, kept, torch.ones_like(kept))
        if rescaled:
            kept = kept / kept.mean().clamp(min=1 / update.shape[0])
        update = update * kept.reshape(-1, *(1,) * (update.dim() - 1))
    if whole:
        kept = (torch.rand(1, device=update.device) > whole).to(update.dtype)
        update = update * torch.where(trains, kept, torch.ones_like(kept)).reshape((1,) * update.dim())
    return update


def drop_blocks(probe: Tensor, blocks: Tensor, probability: float) -> Tensor:
    """Put the identity in place of some blocks `[factors, blocks, size, size]` of one factor, while training.

    The factor is drawn, and that part of its blocks, rounded down, which the probability says.
    """
    import torch

    factors, count, size, _ = blocks.shape
    order = torch.rand(count, device=blocks.device).argsort().argsort()
    chosen = torch.rand(factors, device=blocks.device).argsort().argsort() == 0
    dropped = chosen[:, None] & (order < int(probability * count)) & (probe != 1)
    return torch.where(dropped[..., None, None], torch.eye(size, device=blocks.device, dtype=blocks.dtype), blocks)


def _one(like: Tensor) -> Tensor:
    return like.new_ones(1)
