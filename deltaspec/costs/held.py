"""Bytes that tensors take where they are, and that linear layers would take as codes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from math import ceil
from typing import Any

from torch import Tensor, nn

from deltaspec.backbone.weight_forms import is_packed

_SCALE, _BLOCK, _BLOCKS = 4, 64, 256
"""Bytes of a float32 scale, values that share one in bitsandbytes' 4 bits, and scales that share one where doubled."""
_CODE_4, _CODE_8 = 16 * 4, 256 * 4
"""Bytes of the tables that say what the codes of 4 bits, and those of scales in 8 bits, stand for."""


def bytes_of(tensors: Iterable[Tensor]) -> int:
    """Return the bytes of these tensors, each once; of codes with what they are read by."""
    seen: dict[int, int] = {}
    for tensor in tensors:
        for part in _parts(tensor):
            seen[id(part)] = part.numel() * part.element_size()
    return sum(seen.values())


def _parts(tensor: Any) -> Iterator[Tensor]:
    """Yield what a tensor is made of, and what its library keeps beside it."""
    if hasattr(tensor, "__tensor_flatten__"):
        for name in tensor.__tensor_flatten__()[0]:
            yield from _parts(getattr(tensor, name))
        return
    yield tensor
    state = getattr(tensor, "quant_state", None)
    while state is not None:
        yield from (value for value in vars(state).values() if isinstance(value, Tensor))
        state = getattr(state, "state2", None)
    if isinstance(scales := getattr(tensor, "SCB", None), Tensor):
        yield scales


def configured(model: nn.Module) -> str | None:
    """Return the form that bitsandbytes would pack a model in by its configuration, where it has not yet done so."""
    wanted: Any = getattr(getattr(model, "config", None), "quantization_config", None)
    told = wanted if isinstance(wanted, Mapping) else getattr(wanted, "__dict__", {})

    def says(*names: str) -> bool:
        return any(told.get(name) is True for name in names)

    if any(map(is_packed, model.modules())):
        return None
    if says("load_in_8bit", "_load_in_8bit"):
        return "8bit"
    if says("load_in_4bit", "_load_in_4bit"):
        return "4bit_double" if says("bnb_4bit_use_double_quant") else "4bit"
    return None


def saved_by(form: str, model: nn.Module) -> tuple[int, int]:
    """Return the bytes that a model's linear layers would need less if they were packed, and the largest as values.

    As transformers packs them with bitsandbytes: all but those that give the model's output, and what is packed
    already.
    """
    less, largest = 0, 0
    named: Any = getattr(model, "get_output_embeddings", None)
    head = named() if named is not None else None
    tied = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    for module in {id(m): m for m in model.modules()}.values():
        weight = module._parameters.get("weight")
        linear = isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"
        if weight is None or not linear or is_packed(module) or module is head or id(weight) in tied:
            continue
        plain = weight.numel() * weight.element_size()
        less += plain - _packed_bytes(form, weight.numel(), max(1, weight.numel() // max(1, weight.shape[-1])))
        largest = max(largest, plain)
    return less, largest


def _packed_bytes(form: str, count: int, rows: int) -> int:
    if form == "8bit":
        return count + rows * _SCALE
    scales = ceil(count / _BLOCK)
    if form == "4bit":
        return ceil(count / 2) + scales * _SCALE + _CODE_4
    return ceil(count / 2) + scales + ceil(scales / _BLOCKS) * _SCALE + _CODE_4 + _CODE_8 + _SCALE
