"""RoAd: rotates and scales pairs of features that leave a linear layer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, Literal

from pydantic import Field

from deltaspec.methods.base import Method, Tensors, Weights
from deltaspec.methods.declarations import Form, Init, MethodParams, Promises, Refusal, Site, TensorSpec
from deltaspec.methods.shared.weights import reader


class RoadParams(MethodParams):
    """Parameters of road."""

    variant: Literal[1, 2, 4] = 1
    """1: one angle and one scale a pair of features. 2: one a feature. 4: two a feature."""
    group_size: Annotated[int, Field(ge=2, le=65536, multiple_of=2)] = 64
    """Features are paired inside groups of this size, the first half with the second; it divides the output width."""


class Road(Method):
    """2D rotary adaptation."""

    name = "road"
    summary = "rotates and scales pairs of output features"
    paper = (
        "3-in-1: 2D Rotary Adaptation for Efficient Finetuning, Efficient Batching and Composability (arXiv:2409.00119)"
    )
    Params = RoadParams
    promises = Promises(identity_at_start=True, weight="add", per_row=True)
    default_roles = ("attn.q", "attn.v", "attn.qkv")
    example = {"group_size": 32}
    small = {"group_size": 4}
    foreign = {"variant": {r"road_(\d)": r"variant: \1"}}

    def refuse(self, site: Site, params: RoadParams) -> Refusal | None:
        """Take linear layers whose output width is a multiple of the group size."""
        if site.parameter is not None:
            return Refusal(f"road takes modules, not the parameter {site.parameter!r}", "select the module")
        if site.kind not in ("linear", "conv1d"):
            reason = f"road needs a Linear or Conv1D module, not {site.row.type}"
            return Refusal(reason, "select the linear layers inside it")
        width = site.row.out_features
        assert width is not None
        if width % params.group_size:
            fits = next((size for size in (64, 32, 16, 8, 4, 2) if width % size == 0), None)
            hint = f"set group_size: {fits}" if fits else "leave out layers of odd width"
            return Refusal(f"the output width {width} is not a multiple of group_size {params.group_size}", hint)
        if site.row.has_parameter("bias") and not site.is_read("bias"):
            return Refusal(
                f"{reader(site)} reads this module's weight, not its bias, so only part of what leaves it "
                "could be rotated",
                "leave this module out",
            )
        return None

    def tensors(self, site: Site, params: RoadParams) -> tuple[TensorSpec, ...]:
        """Declare `angle` and `scale`, each `[out · variant / 2]`: no rotation, no scaling."""
        assert site.row.out_features is not None
        size = (site.row.out_features * params.variant // 2,)
        return (TensorSpec("angle", size, Init("zeros")), TensorSpec("scale", size, Init("ones")))

    def apply(self, form: Form, params: RoadParams, t: Any, x: Any, base: Callable[..., Any]) -> Any:
        """Turn base(x)."""
        return _turned(base(x), t, params)

    def fold(self, site: Site, params: RoadParams, t: Any, weights: Weights) -> Tensors:
        """Turn the weight's output features and the bias."""
        weight = weights["weight"]
        turned = _turned(weight, t, params) if site.kind == "conv1d" else _turned(weight.t(), t, params).t()
        return {"weight": turned} | ({"bias": _turned(weights["bias"], t, params)} if "bias" in weights else {})


def _turned(h: Any, t: Any, params: RoadParams) -> Any:
    """Rotate and scale pairs in the last dimension: (a, b) -> (a·c₁ - b·s₁, b·c₂ + a·s₂), eq. 4 of the paper."""
    import torch

    half = params.group_size // 2
    if params.variant == 4:
        # Of each group, the first angles and scales belong to the feature itself, the second to its partner.
        angle, scale = (v.unflatten(0, (-1, 2, 2, half)) for v in (t.angle, t.scale))
        own, partner = scale[:, 0] * angle[:, 0].cos(), scale[:, 1] * angle[:, 1].sin()
    else:
        shape = (-1, 1, half) if params.variant == 1 else (-1, 2, half)
        angle, scale = (v.unflatten(0, shape) for v in (t.angle, t.scale))
        own, partner = scale * angle.cos(), scale * angle.sin()
    pairs = h.unflatten(-1, (-1, 2, half))
    crossed = torch.stack((-pairs.select(-2, 1), pairs.select(-2, 0)), -2)
    return (pairs * own + crossed * partner).flatten(-3)
