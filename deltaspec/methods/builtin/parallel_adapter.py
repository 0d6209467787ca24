"""Parallel adapter: base(x) + scale · (U act(D drop(x) + b) + b'), a bottleneck beside a module."""

from __future__ import annotations

from collections.abc import Callable
from math import sqrt
from typing import Any

from deltaspec.methods.base import Method
from deltaspec.methods.declarations import Form, Init, Promises, Refusal, Site, TensorSpec
from deltaspec.methods.shared.activations import Activation, activate
from deltaspec.methods.shared.bottleneck import (
    Dropout,
    ModulePath,
    Scale,
    WidthParams,
    bottleneck_width,
    refuse_serial,
)
from deltaspec.methods.shared.gates import gate_of, opened, refuse_gate
from deltaspec.methods.shared.shapes import hidden_width


class ParallelAdapterParams(WidthParams):
    """Parameters of parallel_adapter; the bottleneck is 24 wide unless `width` or `reduction` says otherwise."""

    activation: Activation = "relu"
    """Activation between the two projections."""
    dropout: Dropout = 0.0
    """Probability of dropping an entry of the bottleneck's input while training."""
    scale: Scale = 4.0
    """Factor in front of the bottleneck's output; the paper's scaled variant has 4, its plain one 1."""
    gate: bool = False
    """Multiply the bottleneck's output by a gate in (0, 1) that its input opens: the mean over positions, padding
    included, of the sigmoid of a linear map (UniPELT, arXiv:2110.07577)."""
    learn_scale: bool = False
    """Train the scale, from `scale`."""
    input_of: ModulePath | None = None
    """Path of another module, whose input the bottleneck takes in the place of the site's: `ln_2` on a GPT-2's
    `mlp.c_proj` takes the residual stream. It is looked up from the site outwards."""


class ParallelAdapter(Method):
    """Scaled parallel adapter."""

    name = "parallel_adapter"
    summary = "bottleneck beside a module, from its input to its output"
    paper = "Towards a Unified View of Parameter-Efficient Transfer Learning (arXiv:2110.04366)"
    Params = ParallelAdapterParams
    promises = Promises(identity_at_start=True, weight=None, per_row=True)
    default_roles = ("attn", "mlp")
    small = {"width": 4}
    faster = ("up",)

    def refuse(self, site: Site, params: ParallelAdapterParams) -> Refusal | None:
        """Take whatever takes and gives a hidden state with its width in the last dimension."""
        if refusal := refuse_serial(self.name, site, "after") if params.input_of else self._refuse_beside(site):
            return refusal
        if params.input_of and site.stream_width is None:
            return Refusal(f"the width of what enters {params.input_of} is not known", "pass example_inputs")
        return refuse_gate(site) if params.gate else None

    def _refuse_beside(self, site: Site) -> Refusal | None:
        """Return why nothing can go from what enters a site to what leaves it."""
        if site.kind == "embedding":
            return Refusal("an embedding takes ids, so nothing can stand beside it", "use method adapter")
        if refusal := refuse_serial(self.name, site, "before") or refuse_serial(self.name, site, "after"):
            return refusal
        if site.moves:
            return Refusal(
                f"this {site.row.type} gives other positions than it takes, so nothing can stand beside it",
                "select the blocks or linear layers inside it",
            )
        return None

    def stream(self, params: ParallelAdapterParams) -> str | None:
        """Return the module whose input it takes, if that is another one's."""
        return params.input_of

    def tensors(self, site: Site, params: ParallelAdapterParams) -> tuple[TensorSpec, ...]:
        """Declare D `[width, in]`, its bias, U `[out, width]`, its bias, and the scale `[1]` if it is trained."""
        entering = site.stream_width if params.input_of else hidden_width(site, "before")
        leaving = hidden_width(site, "after")
        assert entering is not None and leaving is not None
        width = bottleneck_width(leaving, params, default=24)
        # As in the paper: D as nn.Linear's own, everything else zero.
        specs = [
            TensorSpec("down", (width, entering), Init("kaiming_uniform", sqrt(5))),
            TensorSpec("down_bias", (width,), Init("zeros")),
            TensorSpec("up", (leaving, width), Init("zeros")),
            TensorSpec("up_bias", (leaving,), Init("zeros")),
        ]
        if params.learn_scale:
            specs.append(TensorSpec("scale", (1,), Init("constant", params.scale)))
        return (*specs, *(gate_of(entering) if params.gate else ()))

    def apply(self, form: Form, params: ParallelAdapterParams, t: Any, x: Any, base: Callable[..., Any]) -> Any:
        """Compute base(x) + scale · bottleneck(x), or of what enters another module in the place of x."""
        import torch
        from torch.nn import functional as F

        def bottleneck(entering: Any) -> Any:
            inner = activate(params.activation, F.linear(t.dropout(entering), t.down, t.down_bias))
            change = F.linear(inner, t.up, t.up_bias)
            return change * opened(t, entering) if params.gate else change

        if params.input_of is None:
            change = bottleneck(x)
            leaving = base(x)
        else:  # whose module may run inside this one
            leaving = base(x)
            change = bottleneck(t.stream)
        if params.learn_scale:
            return leaving + t.scale * change
        return torch.add(leaving, change, alpha=params.scale)
