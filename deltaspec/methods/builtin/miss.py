"""Matrix shard sharing: one small matrix, repeated along the input, is added to the weight."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

from deltaspec.methods.base import Method, Tensors, Weights
from deltaspec.methods.declarations import Form, Init, MethodParams, Promises, Refusal, Site, TensorSpec
from deltaspec.methods.shared.rank import Rank
from deltaspec.methods.shared.weights import canonical, fold_update, refuse_weight, weight_shape

if TYPE_CHECKING:
    from torch import Tensor


class MissParams(MethodParams):
    """Parameters of miss."""

    rank: Rank = 64
    """Width of a shard of the input: the update maps the sum of all shards to the output."""
    variant: Literal["miss", "mini", "bat"] = "miss"
    """`miss`: a matrix `[rank, out]`. `mini`: `[rank, width]`, repeated along the output, too. `bat`: blocks that
    also multiply the weight's own blocks, W + W D + D, one per `rank` outputs."""
    width: Annotated[int, Field(ge=1, le=65536)] = 1
    """For `mini`: width of the repeated part of the output; it must divide the output's width."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Probability of dropping an entry of the update's input while training; not for `bat`."""


class Miss(Method):
    """MiSS."""

    name = "miss"
    summary = "one small matrix shared by all shards of a weight"
    paper = "MiSS: Balancing LoRA Performance and Efficiency with Simple Shard Sharing (arXiv:2409.15371)"
    Params = MissParams
    promises = Promises(identity_at_start=True, weight="add", per_row=True)
    default_roles = ("attn.q", "attn.v", "attn.qkv")
    matrices = True
    small = {"rank": 2}
    foreign = {
        "miss_dropout": "dropout",
        "mini_r": {"(.*)": r"{variant: mini, width: \1}"},
        "init_weights": {"(bat|mini)": r"variant: \1"},
    }

    def refuse(self, site: Site, params: MissParams) -> Refusal | None:
        """Take linear layers that are at least as wide as a shard."""
        if refusal := refuse_weight(site, "miss", ("linear", "conv1d"), params.dropout):
            return refusal
        (out_width, in_width), rank = weight_shape(site), params.rank
        if rank > in_width:
            return Refusal(f"shards of {rank} are wider than the input, {in_width}", f"use rank: {in_width} or less")
        if params.variant == "mini" and out_width % params.width:
            return Refusal(f"width {params.width} does not divide the output's width {out_width}", "use width: 1")
        if params.variant == "bat" and (in_width % rank or out_width % rank):
            return Refusal(
                f"variant: bat needs a rank that divides {in_width} (in) and {out_width} (out), not {rank}",
                "use another rank, or variant: miss",
            )
        if params.variant == "bat" and params.dropout:
            return Refusal("variant: bat changes the weight, so dropout has no place", "set dropout: 0")
        return None

    def tensors(self, site: Site, params: MissParams) -> tuple[TensorSpec, ...]:
        """Declare the shared matrix: `[rank, out]`, `[rank, width]` (mini) or `[out / rank, rank, rank]` (bat)."""
        out_width, rank = weight_shape(site)[0], params.rank
        shapes = {"miss": (rank, out_width), "mini": (rank, params.width), "bat": (out_width // rank, rank, rank)}
        return (TensorSpec("shard", shapes[params.variant], Init("zeros")),)

    def lowers(self, site: Site, params: MissParams) -> bool:
        """Multiply the weight's own blocks, for `bat`."""
        return params.variant == "bat"

    def reads_weight(self, site: Site, params: MissParams) -> bool:
        """Return True for `bat`, which multiplies by the weight."""
        return params.variant == "bat"

    def apply(self, form: Form, params: MissParams, t: Any, x: Any, base: Callable[..., Any]) -> Any:
        """Compute base(x) + (sum of the shards of drop(x)) · shard."""
        y = base(x)
        update = t.call(_shard_sum, t.dropout(x), params.rank) @ t.shard
        return y + (t.call(_repeated, update, y.shape[-1]) if params.variant == "mini" else update)

    def fold(self, site: Site, params: MissParams, t: Any, weights: Weights) -> Tensors:
        """Add the shards to the weight."""
        (out_width, in_width), rank = weight_shape(site), params.rank
        if params.variant == "bat":
            rows = canonical(site.kind, weights["weight"]).to(t.shard.dtype)
            blocks = rows.reshape(out_width // rank, rank, in_width // rank, rank).permute(2, 0, 1, 3)
            change = blocks @ t.shard + t.shard
            return fold_update(site, weights, change.permute(1, 2, 0, 3).reshape(out_width, in_width))
        shard = _repeated(t.shard, out_width).t()
        return fold_update(site, weights, shard.repeat(1, -(-in_width // rank))[:, :in_width])


def _shard_sum(x: Tensor, rank: int) -> Tensor:
    """Add up the shards of x, `[…, in]`; the last one is filled up with zeros."""
    from torch.nn import functional as F

    x = F.pad(x, (0, -x.shape[-1] % rank))
    return x.reshape(*x.shape[:-1], x.shape[-1] // rank, rank).sum(-2)


def _repeated(x: Tensor, width: int) -> Tensor:
    """Repeat the last dimension until it is this wide."""
    return x.repeat(*(1,) * (x.dim() - 1), width // x.shape[-1])
