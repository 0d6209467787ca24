"""(IA)³: rescales what leaves the keys and values and what enters the feed-forward's second layer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

from pydantic import model_validator

from deltaspec.methods.base import Method, Tensors, Weights
from deltaspec.methods.declarations import Form, Init, MethodParams, Promises, Refusal, Site, TensorSpec
from deltaspec.methods.shared.parts import PartNames, fused_roles_of, refuse_parts, whole
from deltaspec.methods.shared.shapes import along_channels
from deltaspec.methods.shared.weights import reader, scale_inputs, scale_outputs


class Ia3Params(MethodParams):
    """Parameters of ia3."""

    position: Literal["auto", "after", "before"] = "auto"
    """`after` scales what leaves the module, `before` what enters it, `auto` does as the paper: what enters where the
    role is mlp.down, what leaves everywhere else."""
    parts: PartNames | None = None
    """On a fused projection (role attn.qkv, mlp.gate_up): scale what leaves these parts of it alone. [k, v] is the
    paper's choice."""

    @model_validator(mode="after")
    def _parts_leave(self) -> Ia3Params:
        if self.parts is not None and self.position == "before":
            raise ValueError("parts are of what leaves a module, so position: before does not go with them")
        return self


class Ia3(Method):
    """(IA)³."""

    name = "ia3"
    summary = "learned scales of keys, values and the feed-forward's inner activations"
    paper = "Few-Shot Parameter-Efficient Fine-Tuning is Better and Cheaper than In-Context Learning (arXiv:2205.05638)"
    Params = Ia3Params
    promises = Promises(identity_at_start=True, weight="add", per_row=True)
    default_roles = (
        "attn.k", "attn.v", "attn.qkv", "cross_attn.k", "cross_attn.v", "cross_attn.kv", "cross_attn.qkv", "mlp.down",
    )  # fmt: skip
    foreign = {
        "feedforward_modules": "delete it: position: auto scales what enters the second feed-forward layer by itself",
        "init_ia3_weights": "delete it: the start is the usual one",
    }

    def roles(self, params: Ia3Params) -> tuple[str, ...]:
        """Return the usual roles; those that hold the parts, where parts are asked for."""
        return self.default_roles if params.parts is None else fused_roles_of(self.default_roles, params.parts)

    def refuse(self, site: Site, params: Ia3Params) -> Refusal | None:
        """Take the modules that are linear in their input and in their weight."""
        if site.parameter is not None:
            return Refusal(f"ia3 takes modules, not the parameter {site.parameter!r}", "select the module")
        if site.kind not in ("linear", "conv1d", "conv", "embedding"):
            return Refusal(
                f"ia3 needs a Linear, Conv1D, Conv or Embedding module, not {site.row.type}",
                "select the linear layers inside it",
            )
        if site.row.conv is not None and site.row.conv.transposed:
            return Refusal(f"ia3 has no form for the transposed convolution {site.row.type}", "use method full")
        before = self._before(site, params)
        if site.kind == "embedding" and before:
            return Refusal("an embedding takes ids, which cannot be scaled", "set position: after")
        if not before and site.row.has_parameter("bias") and not site.is_read("bias"):
            return Refusal(
                f"{reader(site)} reads this module's weight, not its bias, so only part of what leaves it "
                "could be scaled",
                "set position: before for this site in overrides",
            )
        return None if params.parts is None else refuse_parts(site, params.parts)

    @staticmethod
    def _before(site: Site, params: Ia3Params) -> bool:
        return "mlp.down" in site.row.roles if params.position == "auto" else params.position == "before"

    def tensors(self, site: Site, params: Ia3Params) -> tuple[TensorSpec, ...]:
        """Declare the scale, from ones: `scale_in` `[in]` of what enters or `scale_out` `[out]` of what leaves."""
        before = self._before(site, params)
        width = site.row.in_features if before else site.row.out_features
        assert width is not None
        if params.parts is not None and site.row.parts is not None:
            width = sum(map(site.row.parts.rows, params.parts))
        return (TensorSpec("scale_in" if before else "scale_out", (width,), Init("ones")),)

    def apply(self, form: Form, params: Ia3Params, t: Any, x: Any, base: Callable[..., Any]) -> Any:
        """Compute base(scale * x) or scale * base(x)."""
        if form.tensors == ("scale_in",):
            return base(x * along_channels(t.scale_in, form))
        return base(x) * along_channels(whole(t.scale_out, form.parts, params.parts, 1.0), form)

    def fold(self, site: Site, params: Ia3Params, t: Any, weights: Weights) -> Tensors:
        """Scale the weight's columns, or its rows and the bias."""
        if self._before(site, params):
            return {"weight": scale_inputs(weights["weight"], t.scale_in, site)}
        scale = whole(t.scale_out, site.row.parts, params.parts, 1.0)
        folded = {"weight": scale_outputs(weights["weight"], scale, site)}
        if "bias" in weights:
            folded["bias"] = weights["bias"] * scale
        return folded
