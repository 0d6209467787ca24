"""Compacter: a bottleneck adapter whose projections are sums of Kronecker products, W = Σᵢ Cᵢ ⊗ (Lᵢ Rᵢ)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any

from pydantic import Field

from deltaspec.methods.declarations import Form, Init, Promises, Refusal, Site, TensorSpec
from deltaspec.methods.shared.activations import Activation, activate
from deltaspec.methods.shared.bottleneck import SerialMethod, SerialParams, bottleneck_width, in_series
from deltaspec.methods.shared.rank import Rank
from deltaspec.methods.shared.shapes import hidden_width


class CompacterParams(SerialParams):
    """Parameters of compacter; the reduction is 16 unless `width` or `reduction` says otherwise."""

    rank: Rank = 1
    """Rank of the factors Lᵢ Rᵢ."""
    divisions: Annotated[int, Field(ge=1, le=1024)] = 4
    """Number n of terms, and size of the rule matrices Cᵢ; it divides the hidden width and the bottleneck's."""
    share_rule: bool = True
    """One set of rule matrices for all projections of the delta with as many divisions, as in the paper; false: each
    projection has its own."""
    activation: Activation = "gelu_tanh"
    """Activation between the two projections."""


class Compacter(SerialMethod):
    """Compacter."""

    name = "compacter"
    summary = "adapter whose projections are low-rank hypercomplex products"
    paper = "Compacter: Efficient Low-Rank Hypercomplex Adapter Layers (arXiv:2106.04647)"
    Params = CompacterParams
    promises = Promises(identity_at_start=False, weight=None, per_row=True)
    small = {"width": 4, "divisions": 2}
    faster = ("up",)
    foreign = {
        **SerialMethod.foreign,
        "phm_rank": "rank",
        **dict.fromkeys(("phm_dim", "hypercomplex_division"), "divisions"),
        "shared_phm_rule": "share_rule",
        **dict.fromkeys(
            ("phm_c_init", "phm_init_range", "hypercomplex_nonlinearity", "learn_phm", "factorized_phm",
             "factorized_phm_w", "factorized_phm_rule"),
            "delete it: the start is the usual one",
        ),
    }  # fmt: skip

    def refuse(self, site: Site, params: CompacterParams) -> Refusal | None:
        """Take hidden states in the last dimension whose width, and the bottleneck's, the terms divide."""
        refusal = super().refuse(site, params)
        hidden = hidden_width(site, params.position)
        if refusal is not None or hidden is None:
            return refusal
        for what, size in (("hidden", hidden), ("bottleneck", self._width(hidden, params))):
            if size % params.divisions:
                return Refusal(
                    f"the {what} width {size} is not a multiple of divisions {params.divisions}",
                    f"give a width that is a multiple of {params.divisions}, or other divisions",
                )
        return None

    @staticmethod
    def _width(hidden: int, params: CompacterParams) -> int:
        return bottleneck_width(hidden, params, default=None, reduction=16)

    def tensors(self, site: Site, params: CompacterParams) -> tuple[TensorSpec, ...]:
        """Declare C `[n, n, n]`, and for both projections L `[n, out/n, rank]`, R `[n, rank, in/n]` and the bias."""
        hidden = hidden_width(site, params.position)
        assert hidden is not None
        n, rank = params.divisions, params.rank
        width = self._width(hidden, params)
        # Starts as in the authors' code: rules this small leave a fresh adapter near the identity.
        rule, glorot = Init("normal", 1e-4), Init("xavier_uniform")
        if params.share_rule:
            rules = [TensorSpec("rule", (n, n, n), rule, key=f"rule_{n}")]
        else:
            rules = [TensorSpec("down_rule", (n, n, n), rule), TensorSpec("up_rule", (n, n, n), rule)]
        return (
            *rules,
            TensorSpec("down_left", (n, width // n, rank), glorot),
            TensorSpec("down_right", (n, rank, hidden // n), glorot),
            TensorSpec("down_bias", (width,), Init("zeros")),
            TensorSpec("up_left", (n, hidden // n, rank), glorot),
            TensorSpec("up_right", (n, rank, width // n), glorot),
            TensorSpec("up_bias", (hidden,), Init("zeros")),
        )

    def apply(self, form: Form, params: CompacterParams, t: Any, x: Any, base: Callable[..., Any]) -> Any:
        """Compute h + scale · bottleneck(h) with h = base(x), or base of the same on x."""
        n = params.divisions
        down_rule, up_rule = (t.rule, t.rule) if params.share_rule else (t.down_rule, t.up_rule)

        def bottleneck(h: Any) -> Any:
            inner = _hypercomplex(t.dropout(h), n, down_rule, t.down_left, t.down_right) + t.down_bias
            inner = activate(params.activation, inner)
            return _hypercomplex(inner, n, up_rule, t.up_left, t.up_right) + t.up_bias

        return in_series(params, x, base, bottleneck)


def _hypercomplex(h: Any, n: int, rule: Any, left: Any, right: Any) -> Any:
    """Multiply by Σᵢ Cᵢ ⊗ (Lᵢ Rᵢ) without forming it: the n blocks of h are mapped by Lᵢ Rᵢ and mixed by Cᵢ."""
    import torch

    blocks = h.unflatten(-1, (n, -1))
    inner = torch.einsum("...bd,ird->...bir", blocks, right)
    mixed = torch.einsum("...bir,iab->...air", inner, rule)
    return torch.einsum("...air,ior->...ao", mixed, left).flatten(-2)
