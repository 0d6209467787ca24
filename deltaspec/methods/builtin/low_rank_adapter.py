"""Low-rank adapter: a bottleneck adapter whose two projections are products of thin factors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from deltaspec.methods.declarations import Form, Init, Promises, Site, TensorSpec
from deltaspec.methods.shared.activations import Activation, activate
from deltaspec.methods.shared.bottleneck import SerialMethod, SerialParams, bottleneck_width, in_series
from deltaspec.methods.shared.rank import Rank
from deltaspec.methods.shared.shapes import hidden_width


class LowRankAdapterParams(SerialParams):
    """Parameters of low_rank_adapter; the reduction is 32 unless `width` or `reduction` says otherwise."""

    rank: Rank = 1
    """Rank of both projections."""
    activation: Activation = "gelu_tanh"
    """Activation between the two projections."""


class LowRankAdapter(SerialMethod):
    """Adapter with projections of low rank."""

    name = "low_rank_adapter"
    summary = "adapter whose projections are low-rank products"
    paper = "Compacter: Efficient Low-Rank Hypercomplex Adapter Layers (arXiv:2106.04647), its baseline Adapter-LowRank"
    Params = LowRankAdapterParams
    promises = Promises(identity_at_start=True, weight=None, per_row=True)
    small = {"width": 4}
    faster = ("up",)
    foreign = {
        **SerialMethod.foreign,
        **dict.fromkeys(("low_rank_rank", "low_rank_w_rank"), "rank"),
        "low_rank_w_init": "delete it: the start is the usual one",
    }

    def tensors(self, site: Site, params: LowRankAdapterParams) -> tuple[TensorSpec, ...]:
        """Declare D = down_left `[width, rank]` · down_right `[rank, hidden]` and U likewise, with their biases."""
        hidden = hidden_width(site, params.position)
        assert hidden is not None
        width, rank = bottleneck_width(hidden, params, default=None, reduction=32), params.rank
        glorot = Init("xavier_uniform")
        return (
            TensorSpec("down_left", (width, rank), glorot),
            TensorSpec("down_right", (rank, hidden), glorot),
            TensorSpec("down_bias", (width,), Init("zeros")),
            # One zero factor makes a fresh adapter the identity to the bit.
            TensorSpec("up_left", (hidden, rank), Init("zeros")),
            TensorSpec("up_right", (rank, width), glorot),
            TensorSpec("up_bias", (hidden,), Init("zeros")),
        )

    def apply(self, form: Form, params: LowRankAdapterParams, t: Any, x: Any, base: Callable[..., Any]) -> Any:
        """Compute h + scale · bottleneck(h) with h = base(x), or base of the same on x."""
        from torch.nn import functional as F

        def bottleneck(h: Any) -> Any:
            inner = F.linear(F.linear(t.dropout(h), t.down_right), t.down_left, t.down_bias)
            inner = activate(params.activation, inner)
            return F.linear(F.linear(inner, t.up_right), t.up_left, t.up_bias)

        return in_series(params, x, base, bottleneck)
