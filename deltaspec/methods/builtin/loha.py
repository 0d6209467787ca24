"""Low-rank Hadamard product: W + scale · (B₁A₁) ⊙ (B₂A₂), of rank up to rank² for the cost of two low-rank updates."""

from __future__ import annotations

from collections.abc import Callable
from math import sqrt
from typing import Annotated, Any

from pydantic import Field

from deltaspec.methods.base import Method, Tensors, Weights
from deltaspec.methods.declarations import Form, Init, MethodParams, Promises, Refusal, Site, TensorSpec
from deltaspec.methods.shared.dropouts import Probability, drop_update, training
from deltaspec.methods.shared.rank import Rank
from deltaspec.methods.shared.weights import add_update, fold_update, refuse_weight, substitutes_update, weight_shape


class LohaParams(MethodParams):
    """Parameters of loha."""

    rank: Rank = 8
    """Rank of each of the two factors; their product has up to its square."""
    alpha: Annotated[float, Field(gt=0, le=1e6)] = 8.0
    """Numerator of the scale alpha / rank."""
    tucker: bool = False
    """For convolutions with kernels larger than 1: factors over the channels around a small kernel of `[rank, rank, …]`
    (proposition 3 of the paper), instead of factors of the flattened kernel."""
    rank_dropout: Probability = 0.0
    """Probability of dropping a row of the update while training, one drawing a forward; the others are scaled up."""
    module_dropout: Probability = 0.0
    """Probability of dropping the whole update of a module while training, one drawing a forward."""

    @property
    def scale(self) -> float:
        """Factor in front of the product."""
        return self.alpha / self.rank


class Loha(Method):
    """LoHa."""

    name = "loha"
    summary = "Hadamard product of two low-rank updates of a weight"
    paper = "FedPara: Low-Rank Hadamard Product for Communication-Efficient Federated Learning (arXiv:2108.06098)"
    Params = LohaParams
    promises = Promises(identity_at_start=True, weight="add", per_row=True)
    default_roles = ("attn.q", "attn.v", "attn.qkv")
    matrices = True
    small = {"rank": 2}
    foreign = {"use_effective_conv2d": "tucker"}
    training = frozenset({"rank_dropout", "module_dropout"})

    def dropout(self, params: LohaParams) -> float:
        """Return the larger of the two: by it, a formula sees whether the model trains."""
        return max(params.rank_dropout, params.module_dropout)

    def refuse(self, site: Site, params: LohaParams) -> Refusal | None:
        """Take linear layers, embeddings and convolutions."""
        return refuse_weight(site, "loha", dropout=self.dropout(params))

    def tensors(self, site: Site, params: LohaParams) -> tuple[TensorSpec, ...]:
        """Declare B₁, B₂ `[out, rank]`, A₁, A₂ `[rank, in, *kernel]`; with a core, A `[rank, in]` and the cores."""
        out_width, in_width, *kernel = weight_shape(site)
        rank, start = params.rank, Init("kaiming_uniform", sqrt(5))
        core = params.tucker and any(size > 1 for size in kernel)
        down = (rank, in_width) if core else (rank, in_width, *kernel)
        specs = [
            TensorSpec("up_1", (out_width, rank), start),
            TensorSpec("down_1", down, start),
            TensorSpec("up_2", (out_width, rank), start),
            TensorSpec("down_2", down, Init("zeros")),
        ]
        if core:
            specs += [TensorSpec(f"core_{index}", (rank, rank, *kernel), start) for index in (1, 2)]
        return tuple(specs)

    def substitutes(self, site: Site, params: LohaParams) -> bool:
        """Return True for convolutions and embeddings, which run their own code on the update."""
        return substitutes_update(site)

    def apply(self, form: Form, params: LohaParams, t: Any, x: Any, base: Callable[..., Any]) -> Any:
        """Compute base(x) and the update's output."""
        y = base(x)
        update = _update(params, t, "core_1" in form.tensors)
        if self.dropout(params):
            probe = training(t, t.up_1)
            update = t.call(drop_update, probe, update, params.rank_dropout, True, params.module_dropout)
        return add_update(form, y, x, update, base)

    def fold(self, site: Site, params: LohaParams, t: Any, weights: Weights) -> Tensors:
        """Add the update to the weight."""
        return fold_update(site, weights, _update(params, t, hasattr(t, "core_1")))


def _update(params: LohaParams, t: Any, core: bool) -> Any:
    import torch

    if core:
        one = torch.einsum("ij...,jc,oi->oc...", t.core_1, t.down_1, t.up_1)
        two = torch.einsum("ij...,jc,oi->oc...", t.core_2, t.down_2, t.up_2)
    else:
        one = torch.tensordot(t.up_1, t.down_1, dims=1)
        two = torch.tensordot(t.up_2, t.down_2, dims=1)
    return one * two * params.scale
