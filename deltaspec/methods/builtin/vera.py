"""Vector-based random adaptation: Wx + b + Λ_b B Λ_d A drop(x) with frozen random A and B shared by all sites."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any

from pydantic import Field

from deltaspec.methods.base import Method, Tensors, Weights
from deltaspec.methods.declarations import Form, Init, MethodParams, Promises, Refusal, Site, TensorSpec
from deltaspec.methods.shared.rank import Rank
from deltaspec.methods.shared.weights import fold_update, refuse_weight, weight_shape


class VeraParams(MethodParams):
    """Parameters of vera."""

    rank: Rank = 256
    """Rank of the shared random matrices. It costs one trained value a site, so it may be large."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Probability of dropping an entry of the update's input while training."""
    initial_scale: Annotated[float, Field(gt=0, le=1e6)] = 0.1
    """Start of the inner scales Λ_d; the outer ones, Λ_b, start at zero."""


class Vera(Method):
    """VeRA."""

    name = "vera"
    summary = "two scale vectors around random matrices that all sites share"
    paper = "VeRA: Vector-based Random Matrix Adaptation (arXiv:2310.11454)"
    Params = VeraParams
    promises = Promises(identity_at_start=True, weight="add", per_row=True)
    default_roles = ("attn.q", "attn.v", "attn.qkv")
    matrices = True
    small = {"rank": 4}
    foreign = {
        "vera_dropout": "dropout",
        "d_initial": "initial_scale",
        "projection_prng_key": (
            "delete it: the shared matrices are drawn by the spec's own seed (seed: 0, beside deltas)"
        ),
        "save_projection": "delete it: the shared matrices are always saved",
    }

    def refuse(self, site: Site, params: VeraParams) -> Refusal | None:
        """Take linear layers."""
        return refuse_weight(site, "vera", ("linear", "conv1d"), params.dropout)

    def tensors(self, site: Site, params: VeraParams) -> tuple[TensorSpec, ...]:
        """Declare Λ_d `[rank]`, Λ_b `[out]`; A `[rank, in]` and B `[out, rank]`, frozen, one for each width."""
        out_width, in_width = weight_shape(site)
        rank, start = params.rank, Init("kaiming_uniform", 0.0)
        return (
            TensorSpec("inner_scale", (rank,), Init("constant", params.initial_scale)),
            TensorSpec("outer_scale", (out_width,), Init("zeros")),
            TensorSpec("down", (rank, in_width), start, buffer=True, key=f"shared.down.{rank}x{in_width}"),
            TensorSpec("up", (out_width, rank), start, buffer=True, key=f"shared.up.{out_width}x{rank}"),
        )

    def apply(self, form: Form, params: VeraParams, t: Any, x: Any, base: Callable[..., Any]) -> Any:
        """Compute base(x) + outer · up(inner · down(drop(x)))."""
        from torch.nn import functional as F

        return base(x) + t.outer_scale * F.linear(t.inner_scale * F.linear(t.dropout(x), t.down), t.up)

    def fold(self, site: Site, params: VeraParams, t: Any, weights: Weights) -> Tensors:
        """Add Λ_b B Λ_d A to the weight."""
        return fold_update(site, weights, (t.outer_scale[:, None] * t.up) @ (t.inner_scale[:, None] * t.down))
