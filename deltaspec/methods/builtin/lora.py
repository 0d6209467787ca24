"""Low-rank adaptation of a weight: Wx + b + scale · B A drop(x)."""

from __future__ import annotations

from collections.abc import Callable
from math import sqrt
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, model_validator

from deltaspec.methods.base import Method, Tensors, Weights
from deltaspec.methods.declarations import Form, Init, MethodParams, Promises, Refusal, Site, TensorSpec
from deltaspec.methods.shared.dora import decompose, decomposed_output, squared_norms
from deltaspec.methods.shared.parts import PartNames, add_to_parts, fused_roles_of, refuse_parts, spread
from deltaspec.methods.shared.rank import Rank
from deltaspec.methods.shared.shapes import along_channels
from deltaspec.methods.shared.starts import orthogonal, principal, triangular
from deltaspec.methods.shared.weights import canonical, reader, refuse_weight, wasted_rank, weight_shape

if TYPE_CHECKING:
    from torch import Generator, Tensor


class LoraParams(MethodParams):
    """Parameters of lora."""

    rank: Rank = 8
    """Rank r of the update B A."""
    alpha: Annotated[float, Field(gt=0, le=1e6)] = 16.0
    """Numerator of the scale: alpha / rank, or alpha / sqrt(rank) with `scaling: rslora`."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Probability of dropping an entry of the update's input while training."""
    scaling: Literal["standard", "rslora"] = "standard"
    """`standard`: alpha / rank. `rslora`: alpha / sqrt(rank), stable for large ranks (arXiv:2312.03732)."""
    init: Literal["kaiming_uniform", "normal", "orthogonal", "pissa", "olora"] = "kaiming_uniform"
    """How A and B start. `kaiming_uniform` and `normal` (standard deviation 1 / rank): A, with B zero. `orthogonal`:
    both random, with B A = 0; even ranks. `pissa`: the weight's largest singular directions (arXiv:2404.02948).
    `olora`: the first columns of its QR decomposition (arXiv:2406.01775). The last three keep their start as frozen
    buffers and subtract it, so that a fresh delta changes nothing."""
    svd_iterations: Annotated[int, Field(ge=1, le=1000)] | None = None
    """For `init: pissa`: power iterations of a fast randomised decomposition; left out, the full one."""
    use_dora: bool = False
    """Learn a magnitude per output besides the direction (DoRA, arXiv:2402.09353)."""
    bias: bool = False
    """Also learn a bias, added to the output times the scale."""
    channels: Literal["group", "all"] = "group"
    """On a grouped convolution, the input channels that A sees. `group`: its own group's, so that the update is one of
    the weight. `all`: those of all groups, as PEFT's does; no weight of the convolution computes that."""
    parts: PartNames | None = None
    """On a fused projection (role attn.qkv, mlp.gate_up): change these parts of it, such as [q, v], each by an update
    of its own. Left out, one update changes the whole."""

    @model_validator(mode="after")
    def _plain_with_parts(self) -> LoraParams:
        if self.parts is not None and (self.use_dora or self.bias or self.keeps_start):
            raise ValueError("parts go with init kaiming_uniform or normal, without use_dora and bias")
        return self

    @property
    def scale(self) -> float:
        """Factor in front of B A."""
        return self.alpha / (self.rank if self.scaling == "standard" else sqrt(self.rank))

    @property
    def keeps_start(self) -> bool:
        """Whether the initial product is kept and subtracted."""
        return self.init in ("orthogonal", "pissa", "olora")


class Lora(Method):
    """LoRA."""

    name = "lora"
    summary = "low-rank update of a weight"
    paper = "LoRA: Low-Rank Adaptation of Large Language Models (arXiv:2106.09685)"
    Params = LoraParams
    promises = Promises(identity_at_start=True, weight="add", per_row=True)
    default_roles = ("attn.q", "attn.v", "attn.qkv")
    matrices = True
    small = {"rank": 2}
    faster = ("up", "magnitude", "bias")
    foreign = {
        **dict.fromkeys(("r", "lora_r", "lora_rank", "rnk"), "rank"),
        **dict.fromkeys(("lora_alpha", "scaling_factor"), "alpha"),
        "lora_dropout": "dropout",
        "lora_bias": "bias",
        "dora": "use_dora",
        **{key: {True: "scaling: rslora", False: "scaling: standard"} for key in ("use_rslora", "rslora")},
        "init_lora_weights": {
            "gaussian": "init: normal",
            "(pissa|orthogonal|olora)": r"init: \1",
            r"pissa_niter_(\d+)": r"{init: pissa, svd_iterations: \1}",
        },
        **dict.fromkeys(("layer_replication", "megatron_core", "use_bdlora", "use_qalora", "qalora_group_size")),
        "alora_invocation_tokens": None,
    }

    def roles(self, params: LoraParams) -> tuple[str, ...]:
        """Return the usual roles; those that hold the parts, where parts are asked for."""
        return self.default_roles if params.parts is None else fused_roles_of(self.default_roles, params.parts)

    def refuse(self, site: Site, params: LoraParams) -> Refusal | None:
        """Take the modules whose output is linear in one weight matrix."""
        row, rank = site.row, params.rank
        if refusal := refuse_weight(site, "lora", dropout=params.dropout):
            return refusal
        if params.parts is not None:
            return refuse_parts(site, params.parts)
        if row.conv is not None and rank % row.conv.groups:
            return Refusal(
                f"rank {rank} is not a multiple of the {row.conv.groups} groups of this {row.type}",
                f"use a rank that is a multiple of {row.conv.groups}, or leave grouped convolutions out",
            )
        if self._crosses(site, params) and (params.use_dora or site.host is not None):
            what = "use_dora divides by the norm of a weight" if params.use_dora else f"{reader(site)} reads a weight"
            reason = f"{what}, and with channels: all the update is no change of the grouped weight of this {row.type}"
            return Refusal(reason, "set channels: group")
        if site.host is not None and params.bias and not (row.has_parameter("bias") and site.is_read("bias")):
            return Refusal(f"{reader(site)} reads no bias here", "set bias: false for this site in overrides")
        if params.bias and site.kind == "embedding":
            return Refusal(f"{row.type} adds no bias, so a learned one could not be merged", "set bias: false")
        if params.use_dora and params.dropout and site.kind != "embedding" and self.lowers(site, params):
            return Refusal(
                f"use_dora works through the weight of this {row.type}, so dropout on its input has no place",
                "set dropout: 0 for this site in overrides",
            )
        if not params.keeps_start:
            return None
        if site.kind not in ("linear", "conv1d"):
            reason = f"init: {params.init} is for linear layers, not {row.type}"
            return Refusal(reason, "use init: kaiming_uniform here")
        if params.init == "orthogonal" and rank % 2:
            return Refusal(f"init: orthogonal needs an even rank, not {rank}", f"use rank: {rank + 1}")
        if params.init != "orthogonal" and rank > min(weight_shape(site)):
            widest = min(weight_shape(site))
            return Refusal(f"init: {params.init}: this weight has rank {widest}, not {rank}", f"use rank: {widest}")
        return None

    def remark(self, site: Site, params: LoraParams) -> str | None:
        """Tell of ranks that no update of this weight can have."""
        if params.parts is not None or self._crosses(site, params):
            return None
        return wasted_rank(site, params.rank, site.row.conv_groups)

    @staticmethod
    def _crosses(site: Site, params: LoraParams) -> bool:
        """Return whether A sees channels of other groups than its own."""
        return params.channels == "all" and site.row.conv_groups > 1

    def unmergeable(self, site: Site, params: LoraParams) -> str | None:
        """Refuse what sees channels that the weight's own groups do not."""
        if not self._crosses(site, params):
            return None
        return "A sees the channels of all groups (channels: all), and a grouped convolution only those of each"

    def tensors(self, site: Site, params: LoraParams) -> tuple[TensorSpec, ...]:
        """Declare A `[rank, in]` as `down`, B `[out, rank]` as `up`; see `apply` for convolutions and embeddings.

        With `parts`, a pair for each: `q_down`, `q_up`.
        """
        row, rank = site.row, params.rank
        if site.kind == "conv":
            out_channels, in_per_group, *kernel = row.shape_of("weight")
            seen = in_per_group * (site.row.conv_groups if params.channels == "all" else 1)
            down, up = (rank, seen, *kernel), (out_channels, rank // row.conv_groups, *(1 for _ in kernel))
        else:
            out_width, in_width = weight_shape(site)
            down, up = (rank, in_width), (out_width, rank)
        start = Init("normal", 1 / rank) if params.init == "normal" else Init("kaiming_uniform", sqrt(5))
        if params.parts is not None and row.parts is not None:
            pairs = ((f"{part}_down", f"{part}_up", row.parts.rows(part)) for part in params.parts)
            return tuple(s for a, b, rows in pairs for s in (TensorSpec(a, down, start), TensorSpec(b, (rows, rank))))
        if site.kind == "embedding":
            # As in the reference implementation: the looked-up factor starts at zero, the shared one does not.
            specs = [TensorSpec("down", down, Init("zeros")), TensorSpec("up", up, Init("normal", 1.0))]
        else:
            specs = [TensorSpec("down", down, start), TensorSpec("up", up, Init("zeros"))]
        if params.use_dora:
            specs.append(TensorSpec("magnitude", (up[0],), Init("ones")))
            if not self.lowers(site, params):
                specs.append(TensorSpec("norm_squared", (up[0],), Init("ones"), buffer=True))
        if params.keeps_start:
            specs += [TensorSpec("down_start", down, buffer=True), TensorSpec("up_start", up, buffer=True)]
        if params.bias:
            specs.append(TensorSpec("bias", (up[0],), Init("zeros")))
        return tuple(specs)

    def initialise(self, site: Site, params: LoraParams, weights: Weights, generator: Generator) -> Tensors:
        """Start the magnitude at the weight's norm, and `pissa` and `orthogonal` factors with their copies."""
        given = {}
        if params.use_dora:
            given["norm_squared"] = squared_norms(site.kind, weights["weight"])
            given["magnitude"] = given["norm_squared"].sqrt()
        if params.keeps_start:
            if params.init == "pissa":
                weight = canonical(site.kind, weights["weight"])
                down, up = principal(weight, params.rank, params.scale, params.svd_iterations, generator)
            elif params.init == "olora":
                down, up = triangular(canonical(site.kind, weights["weight"]), params.rank)
            else:
                down, up = orthogonal(weight_shape(site)[0], weight_shape(site)[1], params.rank, generator)
            given |= {"down": down, "down_start": down.clone(), "up": up, "up_start": up.clone()}
        return given

    def substitutes(self, site: Site, params: LoraParams) -> bool:
        """Return True where the host's own code runs on `down` (subclasses pad or scale in it), and for DoRA."""
        return site.kind in ("conv", "embedding") or params.use_dora

    def lowers(self, site: Site, params: LoraParams) -> bool:
        """Return True for DoRA, but for linear layers: there, the norms follow from the host's output on A."""
        return params.use_dora and (site.kind in ("conv", "embedding") or params.keeps_start)

    def reads_weight(self, site: Site, params: LoraParams) -> bool:
        """Return True for DoRA, which divides by the norm of the weight."""
        return params.use_dora

    def needs_base(self, site: Site, params: LoraParams) -> bool:
        """Return True for DoRA, whose magnitude starts as the norm of the backbone's weight."""
        return params.use_dora

    def apply(self, form: Form, params: LoraParams, t: Any, x: Any, base: Callable[..., Any]) -> Any:
        """Compute base(x) + scale · (up(down(drop(x))) + bias); with `keeps_start` less the start's update."""
        import torch
        from torch.nn import functional as F

        y = base(x)
        if params.parts is not None and form.parts is not None:
            given = t.dropout(x)
            updates: dict[str, Any] = {
                part: F.linear(F.linear(given, getattr(t, f"{part}_down")), getattr(t, f"{part}_up"))
                for part in params.parts
            }
            return add_to_parts(y, form.parts, updates, params.scale)
        dropped = x if form.kind == "embedding" else t.dropout(x)
        if form.kind == "embedding":
            update = F.linear(base(x, weight=t.down.t()), t.up)
        elif form.kind == "conv":
            convolve = (F.conv1d, F.conv2d, F.conv3d)[form.weight_dims - 3]
            if params.channels == "all" and form.groups > 1:
                # Each group of the host's own convolution is given A's part for its channels.
                given = base(dropped, weight=t.call(_by_group, t.down, form.groups), bias=None)
                inner = t.call(_added, given, form.groups, form.weight_dims - 2)
            else:
                inner = base(dropped, weight=t.down, bias=None)
            update = convolve(inner, t.up, groups=form.groups)
        elif params.keeps_start:
            # torch multiplies a strided hidden state in another order, by whether the matrix is trained.
            given = dropped.contiguous()
            update = F.linear(F.linear(given, t.down), t.up) - F.linear(F.linear(given, t.down_start), t.up_start)
        else:
            update = F.linear(F.linear(dropped, t.down), t.up)
        if params.use_dora:
            y = decomposed_output(form, t, x, dropped, y, update, params.scale, base)
        else:
            y = torch.add(y, update, alpha=params.scale)
        if params.bias:
            y = torch.add(y, along_channels(t.bias, form), alpha=params.scale)
        return y

    def fold(self, site: Site, params: LoraParams, t: Any, weights: Weights) -> Tensors:
        """Add scale · B A to the weight, in the host's own layout (and the bias, if learned)."""
        if params.parts is not None and site.row.parts is not None:
            updates: dict[str, Tensor] = {
                part: getattr(t, f"{part}_up") @ getattr(t, f"{part}_down") for part in params.parts
            }
            update = spread(site.row.parts, updates, 0.0, weight_shape(site)[1:])
            return {"weight": weights["weight"] + params.scale * canonical(site.kind, update)}
        down, up = t.down, t.up
        if site.kind == "conv":
            groups = site.row.conv_groups
            rank, in_per_group, *kernel = down.shape
            per_group = up.reshape(groups, -1, rank // groups) @ down.reshape(groups, rank // groups, -1)
            update = per_group.reshape(-1, in_per_group, *kernel)
        else:
            update = up @ down
            if params.keeps_start:
                update = update - t.up_start @ t.down_start
            update = canonical(site.kind, update)
        folded = {"weight": weights["weight"] + params.scale * update}
        if params.use_dora:
            folded["weight"] = decompose(site.kind, folded["weight"], t.magnitude)
        if params.bias:
            bias = params.scale * t.bias
            folded["bias"] = weights["bias"] + bias if "bias" in weights else bias
        return folded


def _by_group(down: Tensor, groups: int) -> Tensor:
    """Return A over all channels as the weight of a grouped convolution: its part for each group's channels."""
    rank, _, *kernel = down.shape
    parts = down.reshape(rank, groups, -1, *kernel).transpose(0, 1)
    return parts.reshape(groups * rank, -1, *kernel)


def _added(given: Tensor, groups: int, dims: int) -> Tensor:
    """Add up what the groups of a convolution over so many dimensions gave."""
    channels = given.dim() - dims - 1
    shape = given.shape
    return given.reshape(*shape[:channels], groups, -1, *shape[channels + 1 :]).sum(channels)
