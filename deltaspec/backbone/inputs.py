"""Inputs for one forward of a model: those that were given, or small ones for a transformers model."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only


def call_arguments(example_inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Split example inputs into positional and keyword arguments of the model's forward."""
    if isinstance(example_inputs, Mapping):
        return (), dict(example_inputs)
    if isinstance(example_inputs, tuple | list):
        return tuple(example_inputs), {}
    return (example_inputs,), {}


def dummy_inputs(model: nn.Module) -> dict[str, Tensor] | None:
    """Return small inputs for a transformers model, by the names its forward takes; None for other models."""
    config = getattr(model, "config", None)
    if config is None or not hasattr(model, "main_input_name"):
        return None
    names = set(inspect.signature(model.forward).parameters)
    ids = torch.zeros(1, 4, dtype=torch.long, device="cpu")
    end, size = getattr(config, "eos_token_id", None), getattr(config, "vocab_size", 0)
    if isinstance(end, int) and isinstance(size, int) and end < size:
        ids[0, -1] = end  # BART classifies what stands there
    inputs: dict[str, Tensor] = {}
    if "input_ids" in names:
        inputs["input_ids"] = ids
    if "decoder_input_ids" in names:
        inputs["decoder_input_ids"] = ids
    vision = next((part for name in ("vision_config", "encoder") if (part := getattr(config, name, None))), config)
    if "pixel_values" in names and hasattr(vision, "image_size"):
        size = vision.image_size
        height, width = (size, size) if isinstance(size, int) else tuple(size)
        shape = (1, getattr(vision, "num_channels", 3), height, width)
        inputs["pixel_values"] = torch.zeros(shape, device="cpu")
    if "input_features" in names and hasattr(config, "num_mel_bins"):
        frames = 2 * config.max_source_positions if hasattr(config, "max_source_positions") else 100
        inputs["input_features"] = torch.zeros(1, config.num_mel_bins, frames, device="cpu")
    return inputs or None


def moved_to(inputs: Any, device: str) -> Any:
    """Return the same inputs on a device; those without values become zeros."""

    def moved(value: Tensor) -> Tensor:
        return torch.zeros_like(value, device=device) if value.is_meta else value.to(device)

    return tree_map_only(Tensor, moved, inputs)
