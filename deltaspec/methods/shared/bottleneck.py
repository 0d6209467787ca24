"""What the bottleneck methods share: their common params, the sites they take, and the width of the bottleneck."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from deltaspec.methods.base import Method
from deltaspec.methods.declarations import MethodParams, Refusal, Site
from deltaspec.methods.shared.shapes import channels_first, hidden_width

Width = Annotated[int, Field(ge=1, le=65536)]
Dropout = Annotated[float, Field(ge=0, lt=1)]
Scale = Annotated[float, Field(gt=0, le=1e6)]
ModulePath = Annotated[str, Field(min_length=1, max_length=512, pattern=r"^[^\s.*?\[\]]+(\.[^\s.*?\[\]]+)*$")]
"""Own names from one module down to another, with dots between."""
Placement = Literal["houlsby", "pfeiffer"]

PLACEMENTS: dict[Placement, tuple[str, ...]] = {
    "houlsby": ("attn.o", "cross_attn.o", "mlp.down"),
    "pfeiffer": ("block",),
}
"""Default roles. Houlsby et al. put adapters after each sublayer, before the residual sum; Pfeiffer et al. put one
after the residual sum and norm of the feed-forward, that is, after the block (as arXiv:2110.04366 tells it)."""


class WidthParams(MethodParams):
    """The width of a bottleneck, given as such or by the factor it is narrower."""

    width: Width | None = None
    """Width of the bottleneck; the method's default where neither this nor `reduction` is given."""
    reduction: Width | None = None
    """How many times narrower the bottleneck is than the hidden state, instead of `width`."""

    @model_validator(mode="after")
    def _one_of_both(self) -> Self:
        if self.width is not None and self.reduction is not None:
            raise ValueError("give width or reduction, not both")
        return self


class SerialParams(WidthParams):
    """Params of bottlenecks that stand before or after a module."""

    dropout: Dropout = 0.0
    """Probability of dropping an entry of the bottleneck's input while training."""
    scale: Scale = 1.0
    """Factor in front of the bottleneck's output."""
    position: Literal["after", "before"] = "after"
    """Whether it changes what leaves the module or what enters it."""
    placement: Placement | None = None
    """Where it goes if the delta names no target: `houlsby` (the default) after the attention's output projection and
    after the feed-forward's second layer, `pfeiffer` after the whole block."""


class SerialMethod(Method):
    """A bottleneck before or after a module."""

    default_roles = PLACEMENTS["houlsby"]
    role_choice = "placement"
    foreign: ClassVar[Mapping[str, str | Mapping[Any, str] | None]] = {
        **dict.fromkeys(("bottleneck_dim", "bottleneck_size", "bottleneck", "adapter_dim"), "width"),
        "reduction_factor": "reduction",
        **dict.fromkeys(("non_linearity", "nonlinearity", "act", "act_fn", "activation_fn"), "activation"),
        **dict.fromkeys(("scaling", "scaling_factor"), "scale"),
        "mh_adapter": {True: "placement: houlsby", False: "placement: pfeiffer"},
    }

    def roles(self, params: Any) -> tuple[str, ...]:
        """Return the roles of the placement."""
        return PLACEMENTS[params.placement or "houlsby"]

    def refuse(self, site: Site, params: Any) -> Refusal | None:
        """Take whatever gives (or takes) a hidden state with its width in the last dimension."""
        return refuse_serial(self.name, site, params.position)


def bottleneck_width(hidden: int, params: WidthParams, default: int | None, reduction: int = 1) -> int:
    """Return the width of the bottleneck: as asked for, else `default`, else `hidden` over the default `reduction`."""
    if params.width is not None:
        return params.width
    if params.reduction is None and default is not None:
        return default
    return max(1, hidden // (params.reduction or reduction))


def refuse_serial(method: str, site: Site, position: str) -> Refusal | None:
    """Take whatever gives (or takes) a hidden state with its width in the last dimension."""
    if site.parameter is not None:
        return Refusal(f"{method} takes modules, not the parameter {site.parameter!r}", "select the module")
    if channels_first(site):
        return Refusal(
            f"the output of {site.row.type} has its channels first; {method} works on the last dimension",
            "select modules that give [..., width] hidden states, or use method lora on the convolution",
        )
    if site.kind == "embedding" and position == "before":
        return Refusal("an embedding takes ids, not a hidden state", "set position: after")
    if hidden_width(site, position) is None:
        return Refusal(
            f"the width of the hidden state {position} this {site.row.type} is not known",
            "pass example_inputs, so that one forward on meta tensors can tell, or select a Linear inside it",
        )
    return None


def in_series(params: Any, x: Any, base: Any, change: Any) -> Any:
    """Compute h + scale * change(h) of what leaves the base, or base of the same on what enters it."""
    import torch

    if params.position == "after":
        h = base(x)
        return torch.add(h, change(h), alpha=params.scale)
    return base(torch.add(x, change(x), alpha=params.scale))
