"""Adaptive low-rank adaptation: Wx + b + scale · B diag(e) A drop(x), whose ranks move between sites while it trains.

Training it takes a `deltaspec.allocation.RankAllocator`: it drops the least important entries of e, step by step.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any

from pydantic import Field

from deltaspec.methods.base import Method, Tensors, Weights
from deltaspec.methods.declarations import Form, Init, MethodParams, Promises, Refusal, Site, TensorSpec
from deltaspec.methods.shared.rank import Rank
from deltaspec.methods.shared.weights import (
    add_update,
    fold_update,
    refuse_weight,
    substitutes_update,
    wasted_rank,
    weight_shape,
)


class AdaloraParams(MethodParams):
    """Parameters of adalora."""

    rank: Annotated[int, Field(ge=1, le=65536)] = 8
    """Rank a site (an expert of a stack) has on average once ranks are allocated."""
    initial_rank: Rank = 12
    """Rank each site starts with, and the most it can have in the end; half as much again as `rank` in the paper."""
    alpha: Annotated[float, Field(gt=0, le=1e6)] = 8.0
    """Numerator of the scale alpha / initial_rank."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Probability of dropping an entry of the update's input while training."""

    @property
    def scale(self) -> float:
        """Factor in front of the update."""
        return self.alpha / (self.initial_rank + 1e-5)  # the reference implementation guards against rank 0


class Adalora(Method):
    """AdaLoRA."""

    name = "adalora"
    summary = "low-rank update whose ranks move to the sites that need them"
    paper = "AdaLoRA: Adaptive Budget Allocation for Parameter-Efficient Fine-Tuning (arXiv:2303.10512)"
    Params = AdaloraParams
    promises = Promises(identity_at_start=True, weight="add", per_row=True)
    matrices = True
    default_roles = (
        "attn.q", "attn.k", "attn.v", "attn.qkv", "attn.o", "mlp.up", "mlp.gate", "mlp.gate_up", "mlp.down",
    )  # fmt: skip
    small = {"rank": 2, "initial_rank": 3}
    faster = ("up",)
    foreign = {
        "target_r": "rank",
        "init_r": "initial_rank",
        **dict.fromkeys(
            ("tinit", "tfinal", "deltat", "total_step", "beta1", "beta2", "orth_reg_weight"),
            'delete it: that is told to the training, RankAllocator(compiled, "name", warmup_steps=200, …)',
        ),
    }

    def refuse(self, site: Site, params: AdaloraParams) -> Refusal | None:
        """Take linear layers, embeddings and convolutions."""
        if params.rank > params.initial_rank:
            return Refusal(
                f"rank {params.rank} is more than initial_rank {params.initial_rank}",
                f"set initial_rank: {params.rank + (params.rank + 1) // 2}",
            )
        return refuse_weight(site, "adalora", dropout=params.dropout)

    def remark(self, site: Site, params: AdaloraParams) -> str | None:
        """Tell of ranks that no update of this weight can have."""
        return wasted_rank(site, params.initial_rank)

    def tensors(self, site: Site, params: AdaloraParams) -> tuple[TensorSpec, ...]:
        """Declare A `[rank, in, *kernel]` as `down`, e `[rank]` as `singular`, B `[out, rank]` as `up`."""
        out_width, *inner = weight_shape(site)
        rank, start = params.initial_rank, Init("normal", 0.02)
        return (
            TensorSpec("down", (rank, *inner), start),
            TensorSpec("singular", (rank,), Init("zeros")),
            TensorSpec("up", (out_width, rank), start),
        )

    def substitutes(self, site: Site, params: AdaloraParams) -> bool:
        """Return True for convolutions and embeddings, which run their own code on the update."""
        return substitutes_update(site)

    def apply(self, form: Form, params: AdaloraParams, t: Any, x: Any, base: Callable[..., Any]) -> Any:
        """Compute base(x) + scale · up(e · down(drop(x)))."""
        import torch
        from torch.nn import functional as F

        y = base(x)
        if form.kind in ("conv", "embedding"):
            return add_update(form, y, t.dropout(x) if form.kind == "conv" else x, _update(params, t), base)
        return torch.add(y, F.linear(t.singular * F.linear(t.dropout(x), t.down), t.up), alpha=params.scale)

    def fold(self, site: Site, params: AdaloraParams, t: Any, weights: Weights) -> Tensors:
        """Add the update to the weight."""
        return fold_update(site, weights, _update(params, t))


def _update(params: AdaloraParams, t: Any) -> Any:
    import torch

    return torch.tensordot(t.up * t.singular, t.down, dims=1) * params.scale
