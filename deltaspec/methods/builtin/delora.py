"""Decoupled low-rank adaptation: Wx + b + λ/r · B Ξ A N drop(x), directions and strength λ learned apart.

Ξ = diag(1 / ‖aᵢ‖‖bᵢ‖) normalises the rows aᵢ of A and the columns bᵢ of B; N holds the norms of the columns of W.
"""

from __future__ import annotations

from collections.abc import Callable
from math import sqrt
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

from deltaspec.methods.base import Method, Tensors, Weights
from deltaspec.methods.declarations import Form, Init, MethodParams, Promises, Refusal, Site, TensorSpec
from deltaspec.methods.shared.rank import Rank
from deltaspec.methods.shared.weights import canonical, fold_update, refuse_weight, wasted_rank, weight_shape

if TYPE_CHECKING:
    from torch import Generator


class DeloraParams(MethodParams):
    """Parameters of delora."""

    rank: Rank = 8
    """Number r of pairs of directions."""
    boundary: Annotated[float, Field(gt=0, le=1e6)] = 15.0
    """Start of the learned bound λ: the norm of the learned product is at most that, before the norms in N scale its
    columns. With `init: kept` the start is subtracted, so the weight moves by at most λ and the bound at the start."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Probability of dropping an entry of the update's input while training."""
    init: Literal["kept", "zeros", "random"] = "kept"
    """How B starts, beside a random A. `kept`: random, and the first product is kept as frozen buffers and subtracted,
    as in the paper. `zeros`: at zero, as in PEFT; there gradients are large, and plain gradient descent diverges.
    `random`: random, and a fresh delta changes the output."""


class Delora(Method):
    """DeLoRA."""

    name = "delora"
    summary = "low-rank update of normalised directions and a learned bound"
    paper = "Decoupling Angles and Strength in Low-rank Adaptation (arXiv:2503.18225)"
    Params = DeloraParams
    promises = Promises(identity_at_start=True, weight="add", per_row=True)
    default_roles = ("attn.q", "attn.v", "attn.qkv")
    matrices = True
    small = {"rank": 2}
    foreign = {
        **dict.fromkeys(("delora_lambda", "lambda"), "boundary"),
        "module_dropout": "dropout",
        "init_weights": {True: "init: zeros", False: "init: random"},
    }

    def is_identity_at_start(self, params: DeloraParams) -> bool:
        """Return whether the first product is zero or subtracted."""
        return params.init != "random"

    def refuse(self, site: Site, params: DeloraParams) -> Refusal | None:
        """Take linear layers."""
        return refuse_weight(site, "delora", ("linear", "conv1d"), params.dropout)

    def remark(self, site: Site, params: DeloraParams) -> str | None:
        """Tell of ranks that no update of this weight can have."""
        return wasted_rank(site, params.rank)

    def tensors(self, site: Site, params: DeloraParams) -> tuple[TensorSpec, ...]:
        """Declare A `[rank, in]` as `down`, B `[out, rank]` as `up`, λ `[1]` and, frozen, N `[in]` and what is kept."""
        out_width, in_width = weight_shape(site)
        down, up, start = (params.rank, in_width), (out_width, params.rank), Init("kaiming_uniform", sqrt(5))
        boundary = Init("constant", params.boundary)
        specs = (
            TensorSpec("down", down, start),
            TensorSpec("up", up, Init("zeros") if params.init == "zeros" else start),
            TensorSpec("boundary", (1,), boundary),
            TensorSpec("norm", (in_width,), buffer=True),
        )
        if params.init != "kept":
            return specs
        kept = TensorSpec("down_start", down, buffer=True), TensorSpec("up_start", up, buffer=True)
        return (*specs, *kept, TensorSpec("boundary_start", (1,), boundary, buffer=True))

    def initialise(self, site: Site, params: DeloraParams, weights: Weights, generator: Generator) -> Tensors:
        """Take N from the weight, and draw the factors whose product is kept."""
        import torch

        given = {"norm": canonical(site.kind, weights["weight"]).norm(dim=0)}
        if params.init == "kept":
            for name, width in (("down", given["norm"].numel()), ("up", params.rank)):
                rows = params.rank if name == "down" else weight_shape(site)[0]
                drawn = torch.empty(rows, width).uniform_(-1 / sqrt(width), 1 / sqrt(width), generator=generator)
                given |= {name: drawn, f"{name}_start": drawn.clone()}
        return given

    def apply(self, form: Form, params: DeloraParams, t: Any, x: Any, base: Callable[..., Any]) -> Any:
        """Compute base(x) + up(Ξ λ/r · down(norm · drop(x))), less what is kept of the start."""
        from torch.nn import functional as F

        y = base(x)
        # torch multiplies a strided hidden state in another order, by whether the matrix is trained.
        given = (t.dropout(x) * t.norm).contiguous()
        update = F.linear(F.linear(given, t.down) * _scales(t.down, t.up, t.boundary, params), t.up)
        if params.init == "kept":
            scales = _scales(t.down_start, t.up_start, t.boundary_start, params)
            update = update - F.linear(F.linear(given, t.down_start) * scales, t.up_start)
        return y + update

    def fold(self, site: Site, params: DeloraParams, t: Any, weights: Weights) -> Tensors:
        """Add the update to the weight."""
        update = (t.up * _scales(t.down, t.up, t.boundary, params)) @ t.down
        if params.init == "kept":
            update = update - (t.up_start * _scales(t.down_start, t.up_start, t.boundary_start, params)) @ t.down_start
        return fold_update(site, weights, update * t.norm)


def _scales(down: Any, up: Any, boundary: Any, params: DeloraParams) -> Any:
    """Return the diagonal of Ξ, times λ/r; norms count as 1e-4 at least, as in the reference implementation."""
    return boundary / params.rank / (down.norm(dim=1).clamp(min=1e-4) * up.norm(dim=0).clamp(min=1e-4))
