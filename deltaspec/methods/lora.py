"""Low-rank adaptation of a weight: Wx + b + scale · B A drop(x)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import sqrt
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

from deltaspec.methods._base import Form, Init, Method, MethodParams, Promises, Refusal, Site, TensorSpec
from deltaspec.methods._shapes import along_channels

if TYPE_CHECKING:
    from torch import Tensor


class LoraParams(MethodParams):
    """Parameters of lora."""

    rank: Annotated[int, Field(ge=1, le=65536)] = 8
    """Rank r of the update B A."""
    alpha: Annotated[float, Field(gt=0, le=1e6)] = 16.0
    """Numerator of the scale: alpha / rank, or alpha / sqrt(rank) with `scaling: rslora`."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Probability of dropping an entry of the update's input while training."""
    scaling: Literal["standard", "rslora"] = "standard"
    """`standard`: alpha / rank. `rslora`: alpha / sqrt(rank), stable for large ranks (arXiv:2312.03732)."""
    init: Literal["kaiming_uniform", "normal"] = "kaiming_uniform"
    """How A starts; B starts at zero. `normal` has standard deviation 1 / rank."""
    bias: bool = False
    """Also learn a bias, added to the output."""

    @property
    def scale(self) -> float:
        """Factor in front of B A."""
        return self.alpha / (self.rank if self.scaling == "standard" else sqrt(self.rank))


class Lora(Method):
    """LoRA."""

    name = "lora"
    summary = "low-rank update of a weight"
    paper = "LoRA: Low-Rank Adaptation of Large Language Models (arXiv:2106.09685)"
    Params = LoraParams
    promises = Promises(identity_at_start=True, weight="add", per_row=True)
    default_roles = ("attn.q", "attn.v", "attn.qkv")

    def refuse(self, site: Site, params: LoraParams) -> Refusal | None:
        """Take the modules whose output is linear in one weight matrix."""
        row = site.row
        if site.parameter is not None:
            return Refusal(
                f"lora changes a module's weight, not the single parameter {site.parameter!r}",
                "select the module (path:, role: or type:), or use method full for a bare parameter",
            )
        if site.kind not in ("linear", "conv1d", "embedding", "conv"):
            return Refusal(
                f"lora needs a Linear, Conv1D, Embedding or Conv module, not {row.type}",
                "select the linear layers inside it, or use method adapter for a whole block",
            )
        if row.conv is not None and row.conv.transposed:
            return Refusal(f"lora has no form for the transposed convolution {row.type}", "use method full")
        if row.conv is not None and params.rank % row.conv.groups:
            return Refusal(
                f"rank {params.rank} is not a multiple of the {row.conv.groups} groups of this {row.type}",
                f"use a rank that is a multiple of {row.conv.groups}, or leave grouped convolutions out",
            )
        if site.host is not None and params.dropout:
            return Refusal(
                f"{site.host or 'the model'} reads this weight without calling the module, so dropout on its input has no place",
                "set dropout: 0 for this site in overrides",
            )
        if site.host is not None and params.bias and not (row.has_parameter("bias") and site.is_read("bias")):
            return Refusal(f"{site.host or 'the model'} reads no bias here", "set bias: false for this site in overrides")
        return None

    def tensors(self, site: Site, params: LoraParams) -> tuple[TensorSpec, ...]:
        """Declare A `[rank, in]` as `down`, B `[out, rank]` as `up`; see `apply` for convolutions and embeddings."""
        row, rank = site.row, params.rank
        if site.kind == "conv":
            out_channels, in_per_group, *kernel = row.shape_of("weight")
            down, up = (rank, in_per_group, *kernel), (out_channels, rank // row.conv_groups, *(1 for _ in kernel))
        else:
            assert row.in_features is not None and row.out_features is not None
            down, up = (rank, row.in_features), (row.out_features, rank)
        start = Init("kaiming_uniform", sqrt(5)) if params.init == "kaiming_uniform" else Init("normal", 1 / rank)
        if site.kind == "embedding":
            # As in the reference implementation: the looked-up factor starts at zero, the shared one does not.
            specs = [TensorSpec("down", down, Init("zeros")), TensorSpec("up", up, Init("normal", 1.0))]
        else:
            specs = [TensorSpec("down", down, start), TensorSpec("up", up, Init("zeros"))]
        if params.bias:
            specs.append(TensorSpec("bias", (up[0],), Init("zeros")))
        return tuple(specs)

    def substitutes(self, site: Site, params: LoraParams) -> bool:
        """Convolutions and embeddings run their own code on `down`: subclasses pad or scale in it."""
        return site.kind in ("conv", "embedding")

    def apply(self, form: Form, params: LoraParams, t: Any, x: Any, base: Callable[..., Any]) -> Any:
        """Compute base(x) + scale · up(down(drop(x))) (+ bias)."""
        import torch
        from torch.nn import functional as F

        y = base(x)
        if form.kind == "embedding":
            update = F.linear(base(x, weight=t.down.t()), t.up)
        elif form.kind == "conv":
            convolve = (F.conv1d, F.conv2d, F.conv3d)[form.weight_dims - 3]
            update = convolve(base(t.dropout(x), weight=t.down, bias=None), t.up, groups=form.groups)
        else:
            update = F.linear(F.linear(t.dropout(x), t.down), t.up)
        y = torch.add(y, update, alpha=params.scale)
        if params.bias:
            y = y + along_channels(t.bias, form)
        return y

    def fold(self, site: Site, params: LoraParams, t: Any, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Add scale · B A to the weight, in the host's own layout (and the bias, if learned)."""
        down, up = t.down, t.up
        if site.kind == "conv":
            groups = site.row.conv_groups
            rank, in_per_group, *kernel = down.shape
            out_channels = up.shape[0]
            per_group = up.reshape(groups, out_channels // groups, rank // groups) @ down.reshape(
                groups, rank // groups, -1
            )
            update = per_group.reshape(out_channels, in_per_group, *kernel)
        else:
            update = up @ down
            if site.kind in ("conv1d", "embedding"):
                update = update.t()
        folded = {"weight": weights["weight"] + params.scale * update}
        if params.bias:
            folded["bias"] = weights["bias"] + t.bias if "bias" in weights else t.bias
        return folded
