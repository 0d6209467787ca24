"""Bias tuning: base(x) + bias, the bias added where the module has none."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from deltaspec.methods._base import Form, Init, Method, MethodParams, Promises, Refusal, Site, TensorSpec
from deltaspec.methods._shapes import CHANNELS_FIRST_NORMS, along_channels, output_width

if TYPE_CHECKING:
    from torch import Tensor


class BitfitParams(MethodParams):
    """Parameters of bitfit."""

    add_missing: bool = True
    """Give a bias to modules that have none; false refuses such sites."""


class Bitfit(Method):
    """BitFit."""

    name = "bitfit"
    summary = "trains the biases, and adds them where there are none"
    paper = (
        "BitFit: Simple Parameter-efficient Fine-tuning for Transformer-based Masked Language-models (arXiv:2106.10199)"
    )
    Params = BitfitParams
    promises = Promises(identity_at_start=True, weight="add", per_row=True)
    default_roles = (
        "attn.q", "attn.k", "attn.v", "attn.qkv", "attn.o",
        "mlp.up", "mlp.gate", "mlp.gate_up", "mlp.down", "norm",
    )  # fmt: skip

    def refuse(self, site: Site, params: BitfitParams) -> Refusal | None:
        """Take modules that add, or could add, a bias to their output."""
        if site.parameter is not None:
            return Refusal(f"bitfit takes modules, not the parameter {site.parameter!r}", "use method full")
        if site.kind not in ("linear", "conv1d", "conv", "norm"):
            return Refusal(
                f"bitfit needs a module whose output takes a bias, not {site.row.type}",
                "select the linear, convolution and norm layers inside it",
            )
        if not site.is_read("bias") and site.row.has_parameter("bias"):
            return Refusal(
                f"{site.host or 'the model'} reads this module's weight, not its bias", "leave this module out"
            )
        if not site.row.has_parameter("bias"):
            if site.host is not None:
                return Refusal(
                    f"{site.host} reads this module's parameters without calling it, and there is no bias to read",
                    "leave this module out",
                )
            if not params.add_missing:
                return Refusal("this module has no bias", "set add_missing: true, or select modules with a bias")
        if site.kind == "norm" and not site.row.parameters:
            return Refusal(f"this {site.row.type} has no parameters", "select norms with a weight, or other layers")
        return None

    def tensors(self, site: Site, params: BitfitParams) -> tuple[TensorSpec, ...]:
        """Declare the change of the bias, `[out]`, from zero."""
        return (TensorSpec("bias", (output_width(site.row),), Init("zeros")),)

    def apply(self, form: Form, params: BitfitParams, t: Any, x: Any, base: Callable[..., Any]) -> Any:
        """Compute base(x) + bias."""
        return base(x) + along_channels(t.bias, form)

    def lowers(self, site: Site, params: BitfitParams) -> bool:
        """Norms with channels first do not tell from their weights how many dimensions follow."""
        return site.row.has_parameter("bias") and not set(site.row.bases).isdisjoint(CHANNELS_FIRST_NORMS)

    def fold(self, site: Site, params: BitfitParams, t: Any, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Add to the bias, or become it."""
        return {"bias": weights["bias"] + t.bias if "bias" in weights else t.bias}
