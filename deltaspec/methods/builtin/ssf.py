"""SSF: scales and shifts what leaves each linear layer, convolution and norm."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal

from deltaspec.methods.base import Method, Tensors, Weights
from deltaspec.methods.declarations import Form, Init, MethodParams, Promises, Refusal, Site, TensorSpec
from deltaspec.methods.shared.shapes import CHANNELS_FIRST_NORMS, along_channels, output_width
from deltaspec.methods.shared.weights import reader, scale_outputs, shift_outputs

if TYPE_CHECKING:
    from torch import Generator


class SsfParams(MethodParams):
    """Parameters of ssf."""

    init: Literal["identity", "normal"] = "identity"
    """`identity`: scale 1, shift 0. `normal`: as the authors' code, both with standard deviation 0.02 around that."""


class Ssf(Method):
    """Scaling and shifting of features."""

    name = "ssf"
    summary = "scales and shifts the features that leave a layer"
    paper = "Scaling & Shifting Your Features: A New Baseline for Efficient Model Tuning (arXiv:2210.08823)"
    Params = SsfParams
    promises = Promises(identity_at_start=True, weight="add", per_row=True)
    default_roles = (
        "attn.q", "attn.k", "attn.v", "attn.qkv", "attn.o",
        "cross_attn.q", "cross_attn.k", "cross_attn.v", "cross_attn.kv", "cross_attn.qkv", "cross_attn.o",
        "mlp.up", "mlp.gate", "mlp.gate_up", "mlp.down", "norm",
    )  # fmt: skip

    def is_identity_at_start(self, params: SsfParams) -> bool:
        """Return whether it is not drawn at random."""
        return params.init == "identity"

    def refuse(self, site: Site, params: SsfParams) -> Refusal | None:
        """Take modules that add, or could add, a bias to their output."""
        row = site.row
        if site.parameter is not None:
            return Refusal(f"ssf takes modules, not the parameter {site.parameter!r}", "select the module")
        if site.kind not in ("linear", "conv1d", "conv", "norm"):
            return Refusal(
                f"ssf needs a linear, convolution or norm layer, not {row.type}",
                "select the layers inside it, or use method ia3 on an embedding",
            )
        if row.conv is not None and row.conv.transposed:
            return Refusal(f"ssf has no form for the transposed convolution {row.type}", "use method full")
        if site.kind == "norm" and not row.has_parameter("weight"):
            return Refusal(f"this {row.type} has no parameters", "select norms with a weight, or other layers")
        if site.host is not None and not (row.has_parameter("bias") and site.is_read("bias")):
            return Refusal(
                f"{reader(site)} reads this module's weight by itself, and no bias to shift by",
                "leave this module out, or use method ia3",
            )
        return None

    def tensors(self, site: Site, params: SsfParams) -> tuple[TensorSpec, ...]:
        """Declare `scale` and its shift `bias`, both `[out]`."""
        width = (output_width(site.row),)
        return (TensorSpec("scale", width, Init("ones")), TensorSpec("bias", width, Init("zeros")))

    def initialise(self, site: Site, params: SsfParams, weights: Weights, generator: Generator) -> Tensors:
        """Draw around the identity, where asked for."""
        import torch

        if params.init == "identity":
            return {}
        means = {"scale": 1.0, "bias": 0.0}
        width = output_width(site.row)
        return {name: torch.empty(width).normal_(mean, 0.02, generator=generator) for name, mean in means.items()}

    def apply(self, form: Form, params: SsfParams, t: Any, x: Any, base: Callable[..., Any]) -> Any:
        """Compute scale * base(x) + bias."""
        return base(x) * along_channels(t.scale, form) + along_channels(t.bias, form)

    def lowers(self, site: Site, params: SsfParams) -> bool:
        """Return True for norms with channels first: their weights do not tell how many dimensions follow."""
        return site.row.has_parameter("bias") and not set(site.row.bases).isdisjoint(CHANNELS_FIRST_NORMS)

    def fold(self, site: Site, params: SsfParams, t: Any, weights: Weights) -> Tensors:
        """Scale the weight and the bias, and shift the bias, or let the shift become it."""
        return {
            "weight": scale_outputs(weights["weight"], t.scale, site),
            "bias": weights["bias"] * t.scale + t.bias if "bias" in weights else shift_outputs(weights, t.bias, site),
        }
