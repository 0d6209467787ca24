"""Tensors of rows put together: those that are smaller than others get zeros behind their values."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

Shape = tuple[int, ...]


def largest(shapes: Sequence[Shape]) -> Shape:
    """Return the shape that has room for all of these."""
    return tuple([max(sizes) for sizes in zip(*shapes, strict=True)])


def padded(parts: Sequence[Tensor | None], shape: Shape, like: Tensor, zeros: dict[Any, Any]) -> Tensor:
    """Return `[parts, *shape]`: each padded with zeros to the shape, all zeros for None.

    `like` has the dtype and the device; `zeros` keeps tensors of zeros between calls. Where one dimension differs, as
    ranks do, this is a single call that writes each value once.
    """
    differ = _differing([shape, *(tuple(part.shape) for part in parts if part is not None)])
    if len(differ) > 1 or (differ and torch.compiler.is_compiling()):
        given = [torch.zeros_like(like) if part is None else part for part in parts]
        return torch.stack([padded_like(part, shape) for part in given])
    if not differ:
        return torch.stack([_zeros(shape, like, zeros) if part is None else part for part in parts])
    joined = torch.cat(_pieces(parts, shape, differ[0], like, zeros), differ[0])
    return _by_part(joined, differ[0], len(parts), shape)


class Buffer:
    """Memory for matrices of rows, of members whose own have these shapes; written again and again."""

    def __init__(self, size: int, shapes: Sequence[Shape], like: Tensor) -> None:
        self.shape, self._like = largest(shapes), like
        differ = _differing(shapes)
        self._dim = differ[0] if len(differ) == 1 else None
        self.memory = like.new_empty(
            _joined(self.shape, self._dim, size) if self._dim is not None else (size, *self.shape)
        )
        """What is written: the rows, or their matrices joined in the dimension that differs."""
        self.rows = self.memory if self._dim is None else _by_part(self.memory, self._dim, size, self.shape)
        self.transposed = self.rows.mT

    def fill(self, parts: Sequence[Tensor | None], zeros: dict[Any, Any]) -> None:
        """Write a matrix a row."""
        if self._dim is None:
            self.memory.copy_(padded(parts, self.shape, self._like, zeros))
        else:
            torch.cat(_pieces(parts, self.shape, self._dim, self._like, zeros), self._dim, out=self.memory)


def _differing(shapes: Sequence[Shape]) -> list[int]:
    return [dim for dim, sizes in enumerate(zip(*shapes, strict=True)) if len(set(sizes)) > 1]


def _joined(shape: Shape, dim: int, parts: int) -> Shape:
    return (*shape[:dim], parts * shape[dim], *shape[dim + 1 :])


def _by_part(joined: Tensor, dim: int, parts: int, shape: Shape) -> Tensor:
    return joined.view(*shape[:dim], parts, *shape[dim:]).movedim(dim, 0)


def _pieces(
    parts: Sequence[Tensor | None], shape: Shape, dim: int, like: Tensor, zeros: dict[Any, Any]
) -> list[Tensor]:
    """Return parts, and behind each the zeros that it needs to fill a shape in one dimension."""
    found: list[Tensor] = []
    for part in parts:
        missing = shape[dim]
        if part is not None:
            found.append(part)
            missing -= part.shape[dim]
        if missing:
            found.append(_zeros((*shape[:dim], missing, *shape[dim + 1 :]), like, zeros))
    return found


def padded_like(part: Tensor, shape: Shape) -> Tensor:
    """Return a tensor with zeros behind its values, its last dimensions in this shape."""
    behind = part.shape[part.dim() - len(shape) :]
    if tuple(behind) == shape:
        return part
    return F.pad(
        part, [n for have, want in zip(reversed(behind), reversed(shape), strict=True) for n in (0, want - have)]
    )


def _zeros(shape: Shape, like: Tensor, kept: dict[Any, Any]) -> Tensor:
    """Return zeros, of one memory for all that are asked for."""
    if torch.compiler.is_compiling():
        return like.new_zeros(shape)
    place = (like.dtype, like.device, torch.is_inference_mode_enabled())
    key = (shape, *place)
    found: Tensor | None = kept.get(key)
    if found is None:
        memory: Tensor | None = kept.get(place)
        if memory is None or memory.numel() < prod(shape):
            memory = kept[place] = like.new_zeros(prod(shape))
        found = kept[key] = memory[: prod(shape)].view(shape)
    return found
