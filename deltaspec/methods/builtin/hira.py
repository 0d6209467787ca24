"""Hadamard high-rank adaptation: W + W ⊙ (B A): every entry of the weight is scaled by its own, low-rank factor."""

from __future__ import annotations

from collections.abc import Callable
from math import sqrt
from typing import Any, Literal

from deltaspec.methods.base import Method, Tensors, Weights
from deltaspec.methods.declarations import Form, Init, MethodParams, Promises, Refusal, Site, TensorSpec
from deltaspec.methods.shared.dropouts import Probability
from deltaspec.methods.shared.rank import Rank
from deltaspec.methods.shared.weights import canonical, refuse_weight, weight_shape


class HiraParams(MethodParams):
    """Parameters of hira."""

    rank: Rank = 32
    """Rank of the factor B A. The update W ⊙ (B A) has up to the weight's rank times that."""
    init: Literal["kaiming_uniform", "normal"] = "kaiming_uniform"
    """How A starts; B starts at zero. `normal` has standard deviation 1 / rank."""
    dropout: Probability = 0.0
    """Probability of dropping an entry of the update's input while training; not for embeddings."""


class Hira(Method):
    """HiRA."""

    name = "hira"
    summary = "scales each entry of a weight by a low-rank factor"
    paper = "HiRA: Parameter-Efficient Hadamard High-Rank Adaptation for Large Language Models (ICLR 2025)"
    Params = HiraParams
    promises = Promises(identity_at_start=True, weight="add", per_row=True)
    strength = "weight"
    default_roles = ("attn.q", "attn.v", "attn.qkv")
    matrices = True
    small = {"rank": 2}
    faster = ("up",)
    foreign = {"hira_dropout": "dropout"}

    def refuse(self, site: Site, params: HiraParams) -> Refusal | None:
        """Take linear layers, embeddings and convolutions."""
        if params.dropout and site.kind == "embedding":
            return Refusal("an embedding takes ids, which cannot be dropped", "set dropout: 0 for it in overrides")
        return refuse_weight(site, "hira", dropout=params.dropout)

    def tensors(self, site: Site, params: HiraParams) -> tuple[TensorSpec, ...]:
        """Declare A `[rank, in, *kernel]` as `down`, B `[out, rank]` as `up`."""
        out_width, *inner = weight_shape(site)
        down, up = (params.rank, *inner), (out_width, params.rank)
        if site.kind == "embedding":
            # As in the reference implementation: the looked-up factor starts at zero, the shared one does not.
            return TensorSpec("down", down, Init("zeros")), TensorSpec("up", up, Init("normal", 1.0))
        start = Init("normal", 1 / params.rank) if params.init == "normal" else Init("kaiming_uniform", sqrt(5))
        return TensorSpec("down", down, start), TensorSpec("up", up, Init("zeros"))

    def lowers(self, site: Site, params: HiraParams) -> bool:
        """Work through the weight, about whose entries the formula is, unless the update has an input of its own."""
        return not params.dropout

    def substitutes(self, site: Site, params: HiraParams) -> bool:
        """Return True where the host runs on the scaled weight besides its own."""
        return bool(params.dropout)

    def reads_weight(self, site: Site, params: HiraParams) -> bool:
        """Return True: it scales the entries of the weight."""
        return True

    def needs_base(self, site: Site, params: HiraParams) -> bool:
        """Return True: its factors are of the backbone's entries, also beside another one."""
        return True

    def apply(self, form: Form, params: HiraParams, t: Any, x: Any, base: Callable[..., Any]) -> Any:
        """Compute base(x) + (W ⊙ (B A)) drop(x)."""
        import torch

        y, factor = base(x), canonical(form.kind, torch.tensordot(t.up, t.down, dims=1))
        # Conv1D's addmm needs a bias to add.
        bias = t.up.detach()[:, 0] * 0 if form.kind == "conv1d" else None
        return y + base(t.dropout(x), weight_factor=factor, bias=bias)

    def fold(self, site: Site, params: HiraParams, t: Any, weights: Weights) -> Tensors:
        """Scale the weight's entries."""
        import torch

        weight = weights["weight"]
        return {"weight": weight + weight * canonical(site.kind, torch.tensordot(t.up, t.down, dims=1))}
