"""Inputs for forwards of a model: those that were given, or small ones for a transformers model, and variations."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
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


Call = tuple[bool, tuple[Any, ...], dict[str, Any]]
"""Whether a model is in training mode, and the arguments of its forward."""


def other_calls(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Iterator[list[Call]]:
    """Yield other ways to call a model than this one in evaluation mode, which gave this output.

    In training mode; with labels, where the forward takes them; and one more token, after a cache where it gives one.
    Each as a list of forms of which the first that can be run will do.
    """
    yield [(True, args, kwargs)]
    names = set(inspect.signature(model.forward).parameters)
    inputs = next((value for value in (*args, *kwargs.values()) if isinstance(value, Tensor) and value.dim()), None)
    for name in sorted(names & _LABELS):
        if inputs is not None and kwargs.get(name) is None:
            each, one = torch.zeros(inputs.shape[:2], dtype=torch.long), torch.zeros(len(inputs), dtype=torch.long)
            forms = [{**kwargs, name: labels.to(inputs.device)} for labels in (each, one)]
            yield [(True, args, form) for form in forms]
            yield [(False, args, form) for form in forms]
    yield [(False, *step) for step in one_token(args, kwargs, output)]


_LABELS = frozenset({"label", "labels", "target", "targets"})
"""Names of what a forward is given to return a loss."""


def one_token(
    args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
) -> list[tuple[tuple[Any, ...], dict[str, Any]]]:
    """Return forms of a call with the last position of a sequence alone, after a call that gave this output."""
    inputs = next((value for value in (*args, *kwargs.values()) if isinstance(value, Tensor) and value.dim() > 1), None)
    if inputs is None or inputs.shape[1] < 2 or (inputs.is_floating_point() and inputs.dim() < 3):
        return []

    def last(value: Any) -> Any:
        whole = isinstance(value, Tensor) and value.dim() > 1 and value.shape[1] == inputs.shape[1]
        return value[:, -1:] if whole else value

    step = tuple(map(last, args)), {name: last(value) for name, value in kwargs.items()}
    cache = output.get("past_key_values") if isinstance(output, Mapping) else getattr(output, "past_key_values", None)
    if cache is None:
        return [step]
    kept = {name: value for name, value in step[1].items() if name != "attention_mask"}
    return [(step[0], {**kept, "past_key_values": cache}), step]
