"""A difference of two weights as a product of two thin matrices, of a rank that an error or a limit asks for."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from deltaspec.backbone.random_state import seeded_on_cpu

_WHOLE = 512
"""Widths up to which all singular values are computed; beyond, as many as are needed."""
_FIRST = 64


@dataclass(frozen=True, slots=True, eq=False)
class LowRank:
    """Thin factors of a matrix, and what they leave of it."""

    up: Tensor
    """`[out, rank]`."""
    down: Tensor
    """`[rank, in]`."""
    error: float
    """Norm of what is left, over that of the matrix: measured on these factors."""

    @property
    def rank(self) -> int:
        """Number of directions."""
        return self.up.shape[1]


def low_rank(matrix: Tensor, rank: int | None, error: float) -> LowRank:
    """Return factors of a matrix: of this rank, if it has as many directions, or of the least rank with this error."""
    wide = matrix.to(torch.float64 if min(matrix.shape) <= _WHOLE else torch.float32)
    size = float(torch.linalg.vector_norm(wide))
    u, values, v = _decomposed(wide, size, rank, error)
    least = values[0] * torch.finfo(torch.float32).eps * 4  # smaller ones are rounding
    most = max(1, int((values > least).sum()))
    if rank is None:
        left = (size**2 - values.square().cumsum(0)).clamp(min=0).sqrt() / size
        enough = (left <= error).nonzero()
        chosen = min(most, int(enough[0]) + 1 if len(enough) else most)
    else:
        chosen = min(most, rank)
    root = values[:chosen].sqrt()
    up, down = (u[:, :chosen] * root).float().contiguous(), (v[:, :chosen] * root).t().float().contiguous()
    rest = torch.linalg.vector_norm(wide - up.to(wide) @ down.to(wide))
    return LowRank(up, down, float(rest) / size)


def _decomposed(wide: Tensor, size: float, rank: int | None, error: float) -> tuple[Tensor, Tensor, Tensor]:
    """Return singular vectors and values, as many of the largest as are needed; the same each time."""
    narrow = min(wide.shape)
    count = _FIRST if rank is None else rank + 16
    while narrow > _WHOLE and count < narrow // 2:
        with seeded_on_cpu(0):
            u, values, v = torch.svd_lowrank(wide, q=count, niter=4)
        left = max(0.0, size**2 - float(values.square().sum())) ** 0.5
        if rank is not None or left <= error * size:
            return u, values, v
        count *= 2
    u, values, vh = torch.linalg.svd(wide, full_matrices=False)
    return u, values, vh.t()
