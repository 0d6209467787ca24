"""Orthogonal finetuning: W R x + b, where R turns blocks of the input; the angles between neurons stay as they are."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

from deltaspec.methods.base import Method, Tensors, Weights
from deltaspec.methods.declarations import Form, Init, MethodParams, Promises, Refusal, Site, TensorSpec
from deltaspec.methods.shared.rotations import cayley, cayley_neumann, filter_width, refuse_blocks, rotate, skew
from deltaspec.methods.shared.weights import canonical, own_layout, refuse_weight

if TYPE_CHECKING:
    from torch import Tensor


class OftParams(MethodParams):
    """Parameters of oft."""

    block_size: Annotated[int, Field(ge=2, le=65536)] = 32
    """Width of the blocks that are turned; it must divide the input's width."""
    shared_blocks: bool = False
    """One rotation for all blocks of a site."""
    transform: Literal["cayley_neumann", "cayley"] = "cayley_neumann"
    """How a rotation comes from a skew-symmetric matrix: `cayley` is exactly orthogonal and solves a linear system;
    `cayley_neumann` is a series, faster, and orthogonal for small rotations only."""
    terms: Annotated[int, Field(ge=4, le=64)] = 5
    """Terms of the series of `cayley_neumann`."""


class Oft(Method):
    """OFT."""

    name = "oft"
    summary = "turns blocks of a weight's input by learned rotations"
    paper = "Controlling Text-to-Image Diffusion by Orthogonal Finetuning (arXiv:2306.07280)"
    Params = OftParams
    promises = Promises(identity_at_start=True, weight="add", per_row=True)
    default_roles = ("attn.q", "attn.v", "attn.qkv")
    matrices = True
    small = {"block_size": 2}
    foreign = {
        "r": "write block_size: 32 instead; there, that is the number of blocks; block_size is their width",
        "oft_block_size": "block_size",
        "block_share": "shared_blocks",
        "use_cayley_neumann": {True: "transform: cayley_neumann", False: "transform: cayley"},
        "num_cayley_neumann_terms": "terms",
        **dict.fromkeys(("coft", "eps")),
    }

    def refuse(self, site: Site, params: OftParams) -> Refusal | None:
        """Take linear layers, embeddings and convolutions whose width the blocks fill."""
        return refuse_weight(site, "oft") or refuse_blocks(site, filter_width(site), params.block_size)

    def tensors(self, site: Site, params: OftParams) -> tuple[TensorSpec, ...]:
        """Declare the upper triangles of the skew-symmetric blocks, `[blocks, size (size - 1) / 2]`."""
        size = params.block_size
        blocks = 1 if params.shared_blocks else filter_width(site) // size
        return (TensorSpec("rotation", (blocks, size * (size - 1) // 2), Init("zeros")),)

    def lowers(self, site: Site, params: OftParams) -> bool:
        """Turn a convolution's patches in its weight."""
        return site.kind == "conv"

    def reads_weight(self, site: Site, params: OftParams) -> bool:
        """Return True for convolutions, whose weight it turns."""
        return site.kind == "conv"

    def apply(self, form: Form, params: OftParams, t: Any, x: Any, base: Callable[..., Any]) -> Any:
        """Compute base(x R); an embedding's output is turned instead."""
        if form.kind == "embedding":
            return t.call(_turn, base(x), t.rotation, params.block_size, params.transform, params.terms)
        return base(t.call(_turn, x, t.rotation, params.block_size, params.transform, params.terms))

    def fold(self, site: Site, params: OftParams, t: Any, weights: Weights) -> Tensors:
        """Turn the weight."""
        weight = weights["weight"].to(t.rotation.dtype)
        blocks = _blocks(t.rotation, params.block_size, params.transform, params.terms)
        if site.kind == "embedding":
            return {"weight": rotate(weight, blocks)}
        rows = canonical(site.kind, weight)
        turned = rotate(rows.flatten(1), blocks.transpose(-2, -1)).reshape(rows.shape)
        return {"weight": own_layout(site.kind, turned)}


def _blocks(entries: Tensor, size: int, transform: str, terms: int) -> Tensor:
    blocks = skew(entries, size)
    return cayley_neumann(blocks, terms) if transform == "cayley_neumann" else cayley(blocks)


def _turn(x: Tensor, entries: Tensor, size: int, transform: str, terms: int) -> Tensor:
    return rotate(x, _blocks(entries, size, transform, terms))
