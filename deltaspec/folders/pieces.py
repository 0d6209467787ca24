"""Tensors that a checkpoint keeps under other names, or in pieces: transformers writes stacked experts one by one."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn


def pieces(model: nn.Module, name: str, value: Tensor) -> dict[str, Tensor]:
    """Return what transformers writes of a tensor of a model, by key: itself alone, where it knows no other form.

    The pieces are parts of the value, each element once: values of another kind in its shape say where each goes.
    """
    loaded = sys.modules.get("transformers")
    if loaded is None or not isinstance(model, loaded.PreTrainedModel):
        return {name: value}
    from transformers.core_model_loading import revert_weight_conversion

    return dict(revert_weight_conversion(model, {name: value}))


def joined(model: nn.Module, name: str, shape: tuple[int, ...], piece: Callable[[str], Tensor]) -> Tensor:
    """Return a tensor of a model from the pieces that a checkpoint keeps of it; `piece` gives one by its key."""
    count = torch.Size(shape).numel()
    small = count <= torch.iinfo(torch.int32).max
    places: Mapping[str, Tensor] = pieces(
        model, name, torch.arange(count, dtype=torch.int32 if small else torch.int64).reshape(shape)
    )
    whole: Tensor | None = None
    for key, at in places.items():
        held = piece(key)
        whole = held.new_empty(count) if whole is None else whole
        whole[at.reshape(-1)] = held.reshape(-1)
    assert whole is not None
    return whole.reshape(shape)
