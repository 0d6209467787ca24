"""Bottleneck adapter: h + scale · U act(D drop(h) + b) + b', on the hidden state after or before a module."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any

from pydantic import Field

from deltaspec.methods.declarations import Form, Init, Promises, Refusal, Site, TensorSpec
from deltaspec.methods.shared.activations import Activation, activate
from deltaspec.methods.shared.bottleneck import ModulePath, SerialMethod, SerialParams, bottleneck_width, in_series
from deltaspec.methods.shared.gates import gate_of, opened, refuse_gate
from deltaspec.methods.shared.shapes import hidden_width


class AdapterParams(SerialParams):
    """Parameters of adapter; the bottleneck is 24 wide unless `width` or `reduction` says otherwise."""

    activation: Activation = "gelu"
    """Activation between the two projections."""
    norm_before: bool = False
    """A LayerNorm of its own on the bottleneck's input."""
    norm_after: bool = False
    """A LayerNorm of its own on the bottleneck's output, before that is scaled and added; its weight starts at zero."""
    norm_eps: Annotated[float, Field(gt=0, le=1)] = 1e-5
    """What these norms add to the variance."""
    gate: bool = False
    """Multiply the bottleneck's output by a gate in (0, 1) that its input opens: the mean over positions, padding
    included, of the sigmoid of a linear map (UniPELT, arXiv:2110.07577)."""
    residual_of: ModulePath | None = None
    """Path of another module, what enters which is added to what the bottleneck sees: `ln_2` on a GPT-2's
    `mlp.c_proj` gives it the sum with the residual stream. It is looked up from the site outwards."""
    residual: bool = True
    """Add the bottleneck's output to the hidden state; false puts it in its place, and nothing is the identity then."""


class Adapter(SerialMethod):
    """Bottleneck adapter."""

    name = "adapter"
    summary = "bottleneck with a residual, after or before a module"
    paper = "Parameter-Efficient Transfer Learning for NLP (arXiv:1902.00751)"
    Params = AdapterParams
    promises = Promises(identity_at_start=True, weight=None, per_row=True)
    small = {"width": 4}
    faster = ("up",)
    foreign = {
        **SerialMethod.foreign,
        "ln_before": "norm_before",
        "ln_after": "norm_after",
        "use_gating": "gate",
        **dict.fromkeys(("inv_adapter", "cross_adapter", "original_ln_before", "original_ln_after")),
        **dict.fromkeys(("residual_before_ln", "adapter_residual_before_ln", "output_adapter")),
    }

    def is_identity_at_start(self, params: AdapterParams) -> bool:
        """Return whether it has its residual."""
        return params.residual

    def refuse(self, site: Site, params: AdapterParams) -> Refusal | None:
        """Also refuse a gate where the hidden state has no positions, or more dimensions of them."""
        if refusal := super().refuse(site, params):
            return refusal
        if params.residual_of is not None and params.position == "before":
            return Refusal("residual_of is for what leaves a module", "set position: after")
        if params.residual_of is not None and site.stream_width not in (None, hidden_width(site, "after")):
            reason = f"what enters {params.residual_of} is {site.stream_width:,} wide, and cannot be added here"
            return Refusal(reason, "name a module whose input is as wide as this one's output")
        return refuse_gate(site) if params.gate else None

    def stream(self, params: AdapterParams) -> str | None:
        """Return the module whose input it adds to what it sees."""
        return params.residual_of

    def tensors(self, site: Site, params: AdapterParams) -> tuple[TensorSpec, ...]:
        """Declare D `[width, hidden]`, its bias, U `[hidden, width]`, its bias, and the norms' weights and biases."""
        hidden = hidden_width(site, params.position)
        assert hidden is not None
        width = bottleneck_width(hidden, params, default=24)
        # A fresh adapter is the identity to the bit: U starts at zero, or the norm after it does. Else as in the paper.
        closed = params.residual and not params.norm_after
        specs = [
            TensorSpec("down", (width, hidden), Init("normal", 0.01)),
            TensorSpec("down_bias", (width,), Init("zeros")),
            TensorSpec("up", (hidden, width), Init("zeros") if closed else Init("normal", 0.01)),
            TensorSpec("up_bias", (hidden,), Init("zeros")),
        ]
        if params.norm_before:
            start = Init("ones")
            specs += [TensorSpec("norm_before_weight", (hidden,), start), TensorSpec("norm_before_bias", (hidden,))]
        if params.norm_after:
            start = Init("zeros" if params.residual else "ones")
            specs += [TensorSpec("norm_after_weight", (hidden,), start), TensorSpec("norm_after_bias", (hidden,))]
        return (*specs, *(gate_of(hidden) if params.gate else ()))

    def apply(self, form: Form, params: AdapterParams, t: Any, x: Any, base: Callable[..., Any]) -> Any:
        """Compute h + scale · bottleneck(h) with h = base(x), or base of the same on x; see `residual_of`."""
        import torch
        from torch.nn import functional as F

        def bottleneck(entering: Any) -> Any:
            if params.norm_before:
                weight, bias = t.norm_before_weight, t.norm_before_bias
                entering = F.layer_norm(entering, weight.shape, weight, bias, params.norm_eps)
            h = activate(params.activation, F.linear(t.dropout(entering), t.down, t.down_bias))
            h = F.linear(h, t.up, t.up_bias)
            if params.norm_after:
                h = F.layer_norm(h, t.norm_after_weight.shape, t.norm_after_weight, t.norm_after_bias, params.norm_eps)
            return h * opened(t, entering) if params.gate else h

        if params.residual_of is not None:
            h = base(x)
            change = bottleneck(h + t.stream)
            return torch.add(h, change, alpha=params.scale) if params.residual else change * params.scale
        if params.residual:
            return in_series(params, x, base, bottleneck)
        if params.position == "after":
            return bottleneck(base(x)) * params.scale
        return base(bottleneck(x) * params.scale)
