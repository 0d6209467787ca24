"""The method `shift`: what leaves a linear layer plus a learned vector, times a factor."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from pydantic import Field

from deltaspec.methods import Form, Method, MethodParams, Promises, Refusal, Site, TensorSpec

if TYPE_CHECKING:
    from torch import Tensor


class ShiftParams(MethodParams):
    """Parameters of shift."""

    scale: Annotated[float, Field(gt=0, le=100)] = 1.0
    """Factor in front of the shift."""


class Shift(Method):
    """A learned shift of what leaves a linear layer."""

    name = "shift"
    summary = "a learned shift of hidden states"
    paper = "none: an example of a plug-in"
    Params = ShiftParams
    promises = Promises(identity_at_start=True, weight="add", per_row=True)
    default_roles = ("mlp.down",)
    foreign: ClassVar = {"shift_factor": "scale", "shift_init": None}

    def refuse(self, site: Site, params: ShiftParams) -> Refusal | None:
        """Take linear layers."""
        if site.parameter is not None or site.kind != "linear":
            return Refusal(f"shift needs a Linear module, not {site.row.type}", "select the linear layers inside it")
        if site.host is not None:
            return Refusal(f"{site.host or 'the model'} reads this weight without calling it", "leave this module out")
        return None

    def tensors(self, site: Site, params: ShiftParams) -> tuple[TensorSpec, ...]:
        """Declare the shift, `[out]`, from zero."""
        assert site.row.out_features is not None
        return (TensorSpec("bias", (site.row.out_features,)),)

    def apply(self, form: Form, params: ShiftParams, t: Any, x: Any, base: Callable[..., Any]) -> Any:
        """Compute base(x) + scale · shift."""
        return base(x) + params.scale * t.bias

    def fold(self, site: Site, params: ShiftParams, t: Any, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Add to the bias, or become it."""
        shift = params.scale * t.bias
        return {"bias": weights["bias"] + shift if "bias" in weights else shift}
