"""Bottleneck adapter: h + scale · U act(D drop(h) + b) + b', on the hidden state after or before a module."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, Literal

from pydantic import Field

from deltaspec.methods._activations import Activation, activate
from deltaspec.methods._base import Form, Init, Method, MethodParams, Promises, Refusal, Site, TensorSpec
from deltaspec.methods._shapes import CHANNELS_FIRST_NORMS, hidden_width


class AdapterParams(MethodParams):
    """Parameters of adapter."""

    width: Annotated[int, Field(ge=1, le=65536)] = 24
    """Width of the bottleneck."""
    activation: Activation = "gelu"
    """Between the two projections."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Probability of dropping an entry of the bottleneck's input while training."""
    scale: Annotated[float, Field(gt=0, le=1e6)] = 1.0
    """Factor in front of the bottleneck's output."""
    position: Literal["after", "before"] = "after"
    """Whether it changes what leaves the module or what enters it."""


class Adapter(Method):
    """Bottleneck adapter."""

    name = "adapter"
    summary = "bottleneck with a residual, after or before a module"
    paper = "Parameter-Efficient Transfer Learning for NLP (arXiv:1902.00751)"
    Params = AdapterParams
    promises = Promises(identity_at_start=True, weight=None, per_row=True)
    default_roles = ("attn.o", "mlp.down")

    def refuse(self, site: Site, params: AdapterParams) -> Refusal | None:
        """Take whatever gives (or takes) a hidden state with its width in the last dimension."""
        if site.parameter is not None:
            return Refusal(f"adapter takes modules, not the parameter {site.parameter!r}", "select the module")
        if site.kind == "conv" or not set(site.row.bases).isdisjoint(CHANNELS_FIRST_NORMS):
            return Refusal(
                f"the output of {site.row.type} has its channels first; adapter works on the last dimension",
                "select modules that give [..., width] hidden states, or use method lora on the convolution",
            )
        if site.kind == "embedding" and params.position == "before":
            return Refusal("an embedding takes ids, not a hidden state", "set position: after")
        if hidden_width(site, params.position) is None:
            return Refusal(
                f"the width of the hidden state {params.position} this {site.row.type} is not known",
                "pass example_inputs, so that one forward on meta tensors can tell, or select a Linear inside it",
            )
        return None

    def tensors(self, site: Site, params: AdapterParams) -> tuple[TensorSpec, ...]:
        """Declare D `[width, hidden]`, its bias, U `[hidden, width]` and its bias."""
        hidden, width = hidden_width(site, params.position), params.width
        assert hidden is not None
        # U starts at zero, so that a fresh adapter is the identity to the bit; D as in the paper's N(0, 0.01).
        return (
            TensorSpec("down", (width, hidden), Init("normal", 0.01)),
            TensorSpec("down_bias", (width,), Init("zeros")),
            TensorSpec("up", (hidden, width), Init("zeros")),
            TensorSpec("up_bias", (hidden,), Init("zeros")),
        )

    def apply(self, form: Form, params: AdapterParams, t: Any, x: Any, base: Callable[..., Any]) -> Any:
        """Compute h + scale · bottleneck(h) with h = base(x), or base of the same on x."""
        import torch
        from torch.nn import functional as F

        h = base(x) if params.position == "after" else x
        inner = activate(params.activation, F.linear(t.dropout(h), t.down, t.down_bias))
        h = torch.add(h, F.linear(inner, t.up, t.up_bias), alpha=params.scale)
        return h if params.position == "after" else base(h)
