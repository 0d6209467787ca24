"""Householder reflection adaptation: W H₁ … H_r x + b, each H = I - 2uuᵀ a reflection by a learned direction."""

from __future__ import annotations

from collections.abc import Callable
from math import sqrt
from typing import TYPE_CHECKING, Any

from deltaspec.methods.base import Method, Tensors, Weights
from deltaspec.methods.declarations import Form, MethodParams, Promises, Refusal, Site, TensorSpec
from deltaspec.methods.shared.rank import Rank
from deltaspec.methods.shared.rotations import filter_width
from deltaspec.methods.shared.weights import canonical, own_layout, refuse_weight

if TYPE_CHECKING:
    from torch import Generator, Tensor


class HraParams(MethodParams):
    """Parameters of hra."""

    rank: Rank = 8
    """Number of reflections. An even number starts as equal pairs, which undo each other but for round-off; with an odd
    one a fresh delta changes the output."""
    orthogonal: bool = False
    """Make the directions orthogonal to each other (Gram-Schmidt) before they reflect."""


class Hra(Method):
    """HRA."""

    name = "hra"
    summary = "reflects a weight's input by learned directions"
    paper = (
        "Bridging The Gap between Low-rank and Orthogonal Adaptation via Householder Reflection Adaptation "
        "(arXiv:2405.17484)"
    )
    Params = HraParams
    promises = Promises(identity_at_start=False, weight="add", per_row=True)
    default_roles = ("attn.q", "attn.v", "attn.qkv")
    matrices = True
    small = {"rank": 2}
    foreign = {"apply_gs": "orthogonal"}

    def refuse(self, site: Site, params: HraParams) -> Refusal | None:
        """Take linear layers and convolutions."""
        if refusal := refuse_weight(site, "hra", ("linear", "conv1d", "conv")):
            return refusal
        width = filter_width(site)
        if params.orthogonal and params.rank > width:
            reason = f"no {params.rank} directions of width {width} are orthogonal to each other"
            return Refusal(reason, f"use rank: {width} or less")
        return None

    def remark(self, site: Site, params: HraParams) -> str | None:
        """Tell of more directions than turn a weight every way."""
        width = filter_width(site)
        return f"{width} directions turn a weight of width {width} every way" if params.rank > width else None

    def tensors(self, site: Site, params: HraParams) -> tuple[TensorSpec, ...]:
        """Declare the directions, `[in, rank]`."""
        return (TensorSpec("directions", (filter_width(site), params.rank)),)

    def initialise(self, site: Site, params: HraParams, weights: Weights, generator: Generator) -> Tensors:
        """Draw directions as equal pairs, or one by one where their number is odd or they are made orthogonal."""
        import torch

        width, rank = filter_width(site), params.rank
        # Orthogonal directions cannot be equal: Gram-Schmidt would divide by zero.
        drawn = rank if rank % 2 or params.orthogonal else rank // 2
        half = torch.empty(width, drawn).uniform_(-1 / sqrt(drawn), 1 / sqrt(drawn), generator=generator)
        return {"directions": half if drawn == rank else half.repeat_interleave(2, dim=1)}

    def lowers(self, site: Site, params: HraParams) -> bool:
        """Reflect a convolution's patches in its weight."""
        return site.kind == "conv"

    def reads_weight(self, site: Site, params: HraParams) -> bool:
        """Return True for convolutions, whose weight it reflects."""
        return site.kind == "conv"

    def apply(self, form: Form, params: HraParams, t: Any, x: Any, base: Callable[..., Any]) -> Any:
        """Compute base(reflected x)."""
        return base(t.call(_reflect, x, t.directions, params.orthogonal, True))

    def fold(self, site: Site, params: HraParams, t: Any, weights: Weights) -> Tensors:
        """Reflect the weight."""
        rows = canonical(site.kind, weights["weight"].to(t.directions.dtype))
        reflected = _reflect(rows.flatten(1), t.directions, params.orthogonal, False)
        return {"weight": own_layout(site.kind, reflected.reshape(rows.shape))}


def _reflect(x: Tensor, directions: Tensor, orthogonal: bool, last_first: bool) -> Tensor:
    """Reflect x, `[…, width]`, by one direction after the other."""
    if orthogonal:
        basis = _gram_schmidt(directions)
        return x - 2 * (x @ basis) @ basis.t()
    units = (directions / directions.norm(dim=0)).unbind(1)
    for unit in reversed(units) if last_first else units:
        x = x - 2 * (x @ unit).unsqueeze(-1) * unit
    return x


def _gram_schmidt(directions: Tensor) -> Tensor:
    import torch

    basis: list[Tensor] = []
    for direction in directions.unbind(1):
        for unit in basis:
            direction = direction - (unit @ direction) * unit
        basis.append(direction / direction.norm())
    return torch.stack(basis, dim=1)
