"""Orthogonal matrices as blocks, from skew-symmetric ones by the Cayley transform, and what they do to vectors.

The functions work on tensors, not on proxies: formulas run them with `t.call`.
"""

from __future__ import annotations

from math import prod
from typing import TYPE_CHECKING

from deltaspec.methods.declarations import Refusal, Site
from deltaspec.methods.shared.precision import single

if TYPE_CHECKING:
    from torch import Tensor


def filter_width(site: Site) -> int:
    """Return the width of the vectors that a site's weight multiplies: a convolution's are whole filter patches."""
    if site.kind == "conv":
        return prod(site.row.shape_of("weight")[1:])
    found = site.row.out_features if site.kind == "embedding" else site.row.in_features
    assert found is not None
    return found


def refuse_blocks(site: Site, width: int, size: int, what: str = "block_size") -> Refusal | None:
    """Say that blocks of this size do not fill this width, and which sizes near it do."""
    if width % size == 0:
        return None
    reason = f"{what}: {size} does not divide the width {width} of this {site.row.type}"
    fitting = [divisor for divisor in range(2, width + 1) if width % divisor == 0]  # blocks of one value cannot turn
    if not fitting:
        return Refusal(reason, "leave this module out")
    return Refusal(reason, f"use {what}: {min(fitting, key=lambda divisor: abs(divisor - size))}")


def skew(entries: Tensor, size: int) -> Tensor:
    """Return skew blocks `[blocks, size, size]` from their upper triangles `[blocks, size (size - 1) / 2]`."""
    import torch

    rows, columns = torch.triu_indices(size, size, 1, device=entries.device)
    blocks = torch.arange(entries.shape[0], device=entries.device)[:, None]
    upper = entries.new_zeros(entries.shape[0], size, size).index_put((blocks, rows, columns), entries)
    return upper - upper.transpose(-2, -1)


def cayley(blocks: Tensor) -> Tensor:
    """Return (I - Q)(I + Q)⁻¹ of skew-symmetric blocks Q: orthogonal."""
    import torch

    wide = single(blocks)
    identity = torch.eye(wide.shape[-1], device=wide.device, dtype=wide.dtype)
    solved: Tensor = torch.linalg.solve(identity + wide, identity - wide, left=False)
    return solved.to(blocks.dtype)


def cayley_neumann(blocks: Tensor, terms: int) -> Tensor:
    """Return the same with a Neumann series for the inverse: I + 2Q + 2Q² + … + Qⁿ, n = terms - 1 (arXiv:2506.19847).

    Orthogonal for small Q only. The sign of Q is the opposite of `cayley`'s, as in the reference implementation.
    """
    import torch

    result = torch.eye(blocks.shape[-1], device=blocks.device, dtype=blocks.dtype) + 2 * blocks
    power = blocks
    for exponent in range(2, terms):
        power = power @ blocks
        result = result + (power if exponent == terms - 1 else 2 * power)
    return result


def rotate(x: Tensor, blocks: Tensor) -> Tensor:
    """Multiply x, `[…, width]`, by a block-diagonal matrix, `[blocks, size, size]`; a single block serves all."""
    import torch

    pieces = x.reshape(*x.shape[:-1], x.shape[-1] // blocks.shape[-1], blocks.shape[-1])
    if blocks.shape[0] == 1:
        return (pieces @ blocks[0]).flatten(-2)
    rotated: Tensor = torch.einsum("...rk,rkc->...rc", pieces, blocks)
    return rotated.flatten(-2)
