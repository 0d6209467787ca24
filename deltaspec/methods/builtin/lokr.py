"""Low-rank Kronecker product: W + scale · C ⊗ (B A), where C is small and B A, or a full matrix, fills the rest."""

from __future__ import annotations

from collections.abc import Callable
from math import isqrt, sqrt
from typing import Annotated, Any, Literal

from pydantic import Field

from deltaspec.methods.base import Method, Tensors, Weights
from deltaspec.methods.declarations import Form, Init, MethodParams, Promises, Refusal, Site, TensorSpec
from deltaspec.methods.shared.dropouts import Probability, drop_update, training
from deltaspec.methods.shared.rank import Rank
from deltaspec.methods.shared.weights import add_update, fold_update, refuse_weight, substitutes_update, weight_shape


class LokrParams(MethodParams):
    """Parameters of lokr."""

    rank: Rank = 8
    """Rank of the large factor, where half its larger side is more than that; else it is a full matrix."""
    alpha: Annotated[float, Field(gt=0, le=1e6)] = 8.0
    """Numerator of the scale alpha / rank."""
    factor: Annotated[int, Field(ge=2, le=65536)] | None = None
    """Width of the small factor: exactly this where it divides the layer's widths, else the nearest below that does.
    Left out: widths are split as evenly as they can be."""
    decompose_both: bool = False
    """Make the small factor a low-rank product, too, where that is smaller."""
    tucker: bool = False
    """For convolutions with kernels larger than 1: a core of `[rank, rank, …]` instead of the flattened kernel."""
    init: Literal["zero_small", "zero_large"] = "zero_small"
    """Which factor starts at zero: the small one, or the large one (as LyCORIS does)."""
    rank_dropout: Probability = 0.0
    """Probability of dropping a row of the update while training, one drawing a forward."""
    rank_dropout_scale: bool = False
    """Scale up the rows that rank_dropout leaves."""
    module_dropout: Probability = 0.0
    """Probability of dropping the whole update of a module while training, one drawing a forward."""
    order: Literal["kronecker", "peft_conv1d"] = "kronecker"
    """Where the entries of the product stand. `peft_conv1d`: as PEFT has them on a Conv1d with a full large factor, for
    adapters that were trained there; no Kronecker product of the weight's sides."""

    @property
    def scale(self) -> float:
        """Factor in front of the product."""
        return self.alpha / self.rank


class Lokr(Method):
    """LoKr."""

    name = "lokr"
    summary = "Kronecker product of a small matrix and a low-rank update"
    paper = "Navigating Text-To-Image Customization: From LyCORIS Fine-Tuning to Model Evaluation (arXiv:2309.14859)"
    Params = LokrParams
    promises = Promises(identity_at_start=True, weight="add", per_row=True)
    default_roles = ("attn.q", "attn.v", "attn.qkv")
    matrices = True
    small = {"rank": 2}
    foreign = {"decompose_factor": "factor"}
    training = frozenset({"rank_dropout", "rank_dropout_scale", "module_dropout"})

    def dropout(self, params: LokrParams) -> float:
        """Return the larger of the two: by it, a formula sees whether the model trains."""
        return max(params.rank_dropout, params.module_dropout)

    def refuse(self, site: Site, params: LokrParams) -> Refusal | None:
        """Take linear layers, embeddings and convolutions."""
        if refusal := refuse_weight(site, "lokr", dropout=self.dropout(params)):
            return refusal
        if params.order == "peft_conv1d" and (len(weight_shape(site)) != 3 or not self._is_full(site, params)):
            return Refusal(
                f"order: peft_conv1d is for a Conv1d with a full large factor, not this {site.row.type}",
                "leave order out, or set it in overrides for what it is for",
            )
        return None

    @staticmethod
    def _is_full(site: Site, params: LokrParams) -> bool:
        out_width, in_width, *_ = weight_shape(site)
        return params.rank >= max(split(out_width, params.factor)[1], split(in_width, params.factor)[1]) / 2

    def tensors(self, site: Site, params: LokrParams) -> tuple[TensorSpec, ...]:
        """Declare `small` `[m, p]`, `large` `[n, q, *kernel]` for a weight `[m·n, p·q, *kernel]`, or their factors."""
        out_width, in_width, *kernel = weight_shape(site)
        (m, n), (p, q) = split(out_width, params.factor), split(in_width, params.factor)
        rank, start, zeros = params.rank, Init("kaiming_uniform", sqrt(5)), Init("zeros")
        small, large = (zeros, start) if params.init == "zero_small" else (start, zeros)
        if params.decompose_both and rank < max(m, p) / 2:
            specs = [TensorSpec("small_up", (m, rank), small), TensorSpec("small_down", (rank, p), start)]
        else:
            specs = [TensorSpec("small", (m, p), small)]
        if self._is_full(site, params):
            specs.append(TensorSpec("large", (n, q, *kernel), large))
        elif params.tucker and any(size > 1 for size in kernel):
            specs += [TensorSpec("large_up", (n, rank), start), TensorSpec("large_down", (rank, q), large)]
            specs.append(TensorSpec("large_core", (rank, rank, *kernel), start))
        else:
            specs += [TensorSpec("large_up", (n, rank), start), TensorSpec("large_down", (rank, q, *kernel), large)]
        return tuple(specs)

    def substitutes(self, site: Site, params: LokrParams) -> bool:
        """Return True for convolutions and embeddings, which run their own code on the update."""
        return substitutes_update(site)

    def apply(self, form: Form, params: LokrParams, t: Any, x: Any, base: Callable[..., Any]) -> Any:
        """Compute base(x) and the update's output."""
        y = base(x)
        update = _update(params, t, form.tensors, form.channel_dims)
        if self.dropout(params):
            probe, rows = training(t, update), (params.rank_dropout, params.rank_dropout_scale)
            update = t.call(drop_update, probe, update, *rows, params.module_dropout)
        return add_update(form, y, x, update, base)

    def fold(self, site: Site, params: LokrParams, t: Any, weights: Weights) -> Tensors:
        """Add the update to the weight."""
        names = tuple(spec.name for spec in self.tensors(site, params))
        return fold_update(site, weights, _update(params, t, names, len(weight_shape(site)) - 2))


def split(width: int, factor: int | None) -> tuple[int, int]:
    """Split a width in two divisors, the smaller first: `factor`, or the nearest below it, or the most even split."""
    if factor is not None and width % factor == 0:
        return factor, width // factor
    limit = isqrt(width) if factor is None else min(factor, isqrt(width))
    small = next(size for size in range(limit, 0, -1) if width % size == 0)
    return small, width // small


def _update(params: LokrParams, t: Any, names: tuple[str, ...], kernel_dims: int) -> Any:
    import torch

    small = t.small if "small" in names else t.small_up @ t.small_down
    if "large" in names:
        large = t.large
    elif "large_core" in names:
        large = torch.einsum("ij...,jc,oi->oc...", t.large_core, t.large_down, t.large_up)
    else:
        large = torch.tensordot(t.large_up, t.large_down, dims=1)
    if params.order == "peft_conv1d":
        rows, columns = small.shape[0] * large.shape[0], small.shape[1] * large.shape[1]
        return torch.kron(small, large.contiguous()).reshape(rows, columns, large.shape[2]) * params.scale
    for _ in range(kernel_dims):
        small = small.unsqueeze(-1)
    return torch.kron(small, large.contiguous()) * params.scale
