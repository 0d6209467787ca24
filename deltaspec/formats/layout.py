"""Tensors in memory as they would lie in a safetensors file: alike sets of them share one header."""

from __future__ import annotations

import json
from collections.abc import Mapping
from mmap import mmap
from typing import TypeAlias

import torch
from torch import Tensor

Headers: TypeAlias = dict[tuple[tuple[str, torch.dtype, torch.Size], ...], tuple[bytes, dict[str, int], int]]
"""By names, dtypes and shapes: the header, where each tensor begins, and the length of the file."""


def laid_out(values: Mapping[str, Tensor], headers: Headers) -> mmap:
    """Return tensors as a mapped file would hold them. What safetensors makes of the first of a kind is kept."""
    kind = tuple((key, value.dtype, value.shape) for key, value in sorted(values.items()))
    if kind not in headers:
        headers[kind] = _header(values)
    header, begins, length = headers[kind]
    mapped = mmap(-1, length)
    mapped.write(header)
    for key, value in values.items():
        if count := value.numel():
            place = torch.frombuffer(mapped, dtype=value.dtype, count=count, offset=begins[key])
            place.view(value.shape).copy_(value.detach())
    return mapped


def _header(values: Mapping[str, Tensor]) -> tuple[bytes, dict[str, int], int]:
    from safetensors.torch import save

    content = save({key: value.detach().cpu().contiguous().clone() for key, value in values.items()}, {"format": "pt"})
    length = 8 + int.from_bytes(content[:8], "little")
    places = json.loads(content[8:length])
    return content[:length], {key: length + places[key]["data_offsets"][0] for key in values}, len(content)
