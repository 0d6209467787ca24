"""Initial values of low-rank factors that are not zero at the start.

The backbone's weight is never written. Where the reference implementations take B₀A₀ out of the weight, the delta
keeps B₀ and A₀ as frozen buffers and computes BA − B₀A₀. Both products run the same operations, so a fresh delta is the
identity to the bit. (Dropout, where there is some, acts on the difference.)
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Generator, Tensor


def principal(
    weight: Tensor, rank: int, scale: float, iterations: int | None, generator: Generator
) -> tuple[Tensor, Tensor]:
    """Return the principal part of a canonical weight as factors (down, up): scale · up · down ≈ weight (PiSSA).

    `iterations`: None for the full decomposition, else the power iterations of a randomised one (arXiv:0909.4061).
    """
    import torch

    if iterations is None:
        u, s, v = torch.linalg.svd(weight, full_matrices=False)
    else:
        width = min(rank + 8, *weight.shape)
        drawn = torch.empty(weight.shape[1], width).normal_(generator=generator).to(weight)
        basis, _ = torch.linalg.qr(weight @ drawn)
        for _ in range(iterations):
            basis, _ = torch.linalg.qr(weight.t() @ basis)
            basis, _ = torch.linalg.qr(weight @ basis)
        u, s, v = torch.linalg.svd(basis.t() @ weight, full_matrices=False)
        u = basis @ u
    root = (s[:rank] / scale).sqrt()
    return root[:, None] * v[:rank], u[:, :rank] * root


def triangular(weight: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return the first columns of the QR decomposition of a canonical weight as factors (down, up) (OLoRA)."""
    import torch

    q, r = torch.linalg.qr(weight)
    return r[:rank].contiguous(), q[:, :rank].contiguous()


def orthogonal(out_width: int, in_width: int, rank: int, generator: Generator) -> tuple[Tensor, Tensor]:
    """Return random factors (down, up) of an even rank whose product is zero but for round-off."""
    import torch

    def normal(*shape: int) -> Tensor:
        return torch.empty(shape).normal_(generator=generator)

    q, _ = torch.linalg.qr(normal(rank, rank))
    down = (normal(in_width, rank // 2) @ q[0::2]).t() / 10
    up = normal(out_width, rank // 2) @ q[1::2] / 10
    return down.contiguous(), up
