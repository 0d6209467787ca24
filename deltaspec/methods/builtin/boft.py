"""Orthogonal butterfly: s ⊙ (W R x) + b, where R is a product of sparse rotations that together mix far blocks."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field

from deltaspec.methods.base import Method, Tensors, Weights
from deltaspec.methods.declarations import Form, Init, MethodParams, Promises, Refusal, Site, TensorSpec
from deltaspec.methods.shared.dropouts import Probability, drop_blocks, training
from deltaspec.methods.shared.rotations import cayley, filter_width, refuse_blocks, rotate
from deltaspec.methods.shared.weights import canonical, host_bias, own_layout, refuse_weight, weight_shape

if TYPE_CHECKING:
    from torch import Tensor


class BoftParams(MethodParams):
    """Parameters of boft."""

    block_size: Annotated[int, Field(ge=2, le=65536)] = 4
    """Width of the blocks that are turned; it must divide the input's width."""
    factors: Annotated[int, Field(ge=1, le=16)] = 1
    """Number of butterfly factors: with m of them a value reaches 2^(m-1) blocks. One is block-diagonal, as in OFT."""
    block_dropout: Probability = 0.0
    """Part of the blocks of one factor, both drawn anew in each forward, that turn nothing while training."""


class Boft(Method):
    """BOFT."""

    name = "boft"
    summary = "turns a weight's input by butterfly products of rotations, and scales its outputs"
    paper = "Parameter-Efficient Orthogonal Finetuning via Butterfly Factorization (arXiv:2311.06243)"
    Params = BoftParams
    promises = Promises(identity_at_start=True, weight="add", per_row=True)
    default_roles = ("attn.q", "attn.v", "attn.qkv")
    matrices = True
    small = {"block_size": 2}
    foreign = {
        "boft_block_size": "block_size",
        "boft_block_num": "write block_size: 4 instead; there, that is the number of blocks; block_size is their width",
        "boft_n_butterfly_factor": "factors",
        "boft_dropout": "block_dropout",
    }
    training = frozenset({"block_dropout"})

    def dropout(self, params: BoftParams) -> float:
        """Return the part of the blocks: by it, a formula sees whether the model trains."""
        return params.block_dropout

    def refuse(self, site: Site, params: BoftParams) -> Refusal | None:
        """Take linear layers and convolutions whose width the butterfly fills."""
        if refusal := refuse_weight(site, "boft", ("linear", "conv1d", "conv"), params.block_dropout):
            return refusal
        if params.block_dropout and site.kind == "conv":
            reason = f"a convolution's weight is turned, so block_dropout has no place on this {site.row.type}"
            return Refusal(reason, "set block_dropout: 0 for this site in overrides")
        width, size = filter_width(site), params.block_size
        if refusal := refuse_blocks(site, width, size):
            return refusal
        if params.factors > 1 and size % 2:
            return Refusal(f"butterfly factors halve blocks, and block_size {size} is odd", "use an even block_size")
        if width % (size << (params.factors - 1)):
            most = next(m for m in range(params.factors, 0, -1) if width % (size << (m - 1)) == 0)
            return Refusal(
                f"{params.factors} factors join 2^{params.factors - 1} blocks of {size}, "
                f"which do not fill the width {width} of this {site.row.type}",
                f"use factors: {most}",
            )
        return None

    def tensors(self, site: Site, params: BoftParams) -> tuple[TensorSpec, ...]:
        """Declare free matrices `[factors, blocks, size, size]`, whose skew parts count, and the scale `[out]`."""
        size = params.block_size
        shape = (params.factors, filter_width(site) // size, size, size)
        return TensorSpec("rotation", shape), TensorSpec("output_scale", (weight_shape(site)[0],), Init("ones"))

    def substitutes(self, site: Site, params: BoftParams) -> bool:
        """Ask the host for its bias, which is not scaled."""
        return True

    def lowers(self, site: Site, params: BoftParams) -> bool:
        """Turn a convolution's patches in its weight."""
        return site.kind == "conv"

    def reads_weight(self, site: Site, params: BoftParams) -> bool:
        """Return True for convolutions, whose weight it turns."""
        return site.kind == "conv"

    def reads_bias(self, site: Site, params: BoftParams) -> bool:
        """Return True: it scales the output without the bias."""
        return True

    def apply(self, form: Form, params: BoftParams, t: Any, x: Any, base: Callable[..., Any]) -> Any:
        """Compute s ⊙ (base(x R) - b) + b."""
        probe = training(t, t.rotation) if params.block_dropout else None
        y = base(t.call(turn, x, t.rotation, False, probe, params.block_dropout))
        return y + (t.output_scale - 1) * (y - host_bias(form, base, t.output_scale))

    def fold(self, site: Site, params: BoftParams, t: Any, weights: Weights) -> Tensors:
        """Turn the weight and scale its rows."""
        rows = canonical(site.kind, weights["weight"].to(t.rotation.dtype))
        turned = turn(rows.flatten(1), t.rotation, inverse=True) * t.output_scale[:, None]
        return {"weight": own_layout(site.kind, turned.reshape(rows.shape))}


def turn(
    x: Tensor, rotation: Tensor, inverse: bool = False, probe: Tensor | None = None, dropped: float = 0.0
) -> Tensor:
    """Multiply x, `[…, width]`, by the butterfly matrix Bₘ … B₂ B₁, or by its inverse.

    With a `probe` of training, that part `dropped` of the blocks is left out.
    """
    import torch

    factors, _, size, _ = rotation.shape
    skew = (rotation - rotation.transpose(-2, -1)) / 2
    orthogonal = cayley(skew.flatten(0, 1)).reshape(rotation.shape)
    if probe is not None:
        orthogonal = drop_blocks(probe, orthogonal, dropped)
    for index in range(factors) if inverse else reversed(range(factors)):
        turns = orthogonal[index].transpose(-2, -1) if inverse else orthogonal[index]
        if index == 0:
            x = rotate(x, turns)
            continue
        order = torch.tensor(butterfly(x.shape[-1], size << index, size // 2), device=x.device)
        x = rotate(x[..., order.argsort()], turns)[..., order]
    return x


def butterfly(width: int, group: int, chunk: int) -> list[int]:
    """Return the order that puts, in each group, the even chunks before the odd ones."""
    starts = [*range(0, group, 2 * chunk), *range(chunk, group, 2 * chunk)]
    return [base + start + i for base in range(0, width, group) for start in starts for i in range(chunk)]
