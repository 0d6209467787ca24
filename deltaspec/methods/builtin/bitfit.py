"""Bias tuning: base(x) + bias, the bias added where the module has none."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from deltaspec.methods.base import Method, Tensors, Weights
from deltaspec.methods.declarations import Form, Init, MethodParams, Promises, Refusal, Site, TensorSpec
from deltaspec.methods.shared.parts import PartNames, fused_roles_of, refuse_parts, whole
from deltaspec.methods.shared.shapes import CHANNELS_FIRST_NORMS, along_channels, output_width
from deltaspec.methods.shared.weights import reader, shift_outputs

_BIAS = re.compile(r"bias(_\w+)?|\w+_bias")
"""Names of biases in modules that hold more than one, such as nn.MultiheadAttention and nn.LSTM."""


class BitfitParams(MethodParams):
    """Parameters of bitfit."""

    add_missing: bool = True
    """Add a bias to modules that have none; false refuses such sites."""
    parts: PartNames | None = None
    """On a fused projection (role attn.qkv, mlp.gate_up): change the biases of these parts of it alone, such as [q]."""


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
        "cross_attn.q", "cross_attn.k", "cross_attn.v", "cross_attn.kv", "cross_attn.qkv", "cross_attn.o",
        "mlp.up", "mlp.gate", "mlp.gate_up", "mlp.down", "norm",
    )  # fmt: skip

    def roles(self, params: BitfitParams) -> tuple[str, ...]:
        """Return the usual roles; those that hold the parts, where parts are asked for."""
        return self.default_roles if params.parts is None else fused_roles_of(self.default_roles, params.parts)

    def refuse(self, site: Site, params: BitfitParams) -> Refusal | None:
        """Take modules that add, or could add, a bias to their output."""
        if site.parameter is not None:
            return Refusal(f"bitfit takes modules, not the parameter {site.parameter!r}", "use method full")
        if self._inner(site) and params.parts is None:
            return None
        if site.kind not in ("linear", "conv1d", "conv", "norm"):
            return Refusal(
                f"bitfit needs a module whose output takes a bias, not {site.row.type}",
                "select the linear, convolution and norm layers inside it",
            )
        if not site.is_read("bias") and site.row.has_parameter("bias"):
            return Refusal(f"{reader(site)} reads this module's weight, not its bias", "leave this module out")
        if not site.row.has_parameter("bias"):
            if site.host is not None:
                return Refusal(
                    f"{reader(site)} reads this module's parameters by itself, and there is no bias to read",
                    "leave this module out",
                )
            if not params.add_missing:
                return Refusal("this module has no bias", "set add_missing: true, or select modules with a bias")
        if site.kind == "norm" and not site.row.parameters:
            return Refusal(f"this {site.row.type} has no parameters", "select norms with a weight, or other layers")
        return None if params.parts is None else refuse_parts(site, params.parts)

    @staticmethod
    def _inner(site: Site) -> tuple[str, ...]:
        """Return the names of the biases of a module that holds several, or none of its own kind."""
        if site.kind != "other":
            return ()
        held = [p.name for p in site.row.parameters if _BIAS.fullmatch(p.name) and len(p.shape) == 1]
        return tuple(name for name in held if site.is_read(name))

    def tensors(self, site: Site, params: BitfitParams) -> tuple[TensorSpec, ...]:
        """Declare the change of the bias, `[out]`, from zero; with `parts`, theirs one after the other."""
        if inner := self._inner(site):
            return tuple(TensorSpec(name, site.row.shape_of(name), Init("zeros")) for name in inner)
        width = output_width(site.row)
        if params.parts is not None and site.row.parts is not None:
            width = sum(map(site.row.parts.rows, params.parts))
        return (TensorSpec("bias", (width,), Init("zeros")),)

    def apply(self, form: Form, params: BitfitParams, t: Any, x: Any, base: Callable[..., Any]) -> Any:
        """Compute base(x) + bias."""
        return base(x) + along_channels(whole(t.bias, form.parts, params.parts, 0.0), form)

    def lowers(self, site: Site, params: BitfitParams) -> bool:
        """Return True for norms with channels first, whose weights do not tell how many dimensions follow, and for
        inner biases, which have no output of their own.
        """
        channels_first = not set(site.row.bases).isdisjoint(CHANNELS_FIRST_NORMS)
        return bool(self._inner(site)) or (site.row.has_parameter("bias") and channels_first)

    def fold(self, site: Site, params: BitfitParams, t: Any, weights: Weights) -> Tensors:
        """Add to the bias, or become it."""
        if inner := self._inner(site):
            return {name: weights[name] + getattr(t, name) for name in inner}
        return {"bias": shift_outputs(weights, whole(t.bias, site.row.parts, params.parts, 0.0), site)}
