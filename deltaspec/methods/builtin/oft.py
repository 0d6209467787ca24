"""Orthogonal finetuning: W R x + b, where R turns blocks of the input; the angles between neurons stay as they are."""

from __future__ import annotations

from collections.abc import Callable
from math import sqrt
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

from deltaspec.methods.base import Method, Tensors, Weights
from deltaspec.methods.declarations import Form, Init, MethodParams, Promises, Refusal, Site, TensorSpec
from deltaspec.methods.shared.dropouts import Probability, drop_blocks, training
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
    terms: Annotated[int, Field(ge=2, le=64)] = 5
    """Terms of the series of `cayley_neumann`."""
    constraint: Annotated[float, Field(gt=0, le=1e6)] | None = None
    """Largest norm of all skew-symmetric blocks of a site together (COFT's eps): longer ones are shortened to it before
    they turn anything, and learn by the gradient at what they were shortened to."""
    patches: tuple[Annotated[int, Field(ge=1)], Annotated[int, Field(ge=1)]] | None = None
    """For two-dimensional convolutions that PEFT trained: turn all patches of this size, the kernel's, that the input
    has, and add them up again before the convolution, in the order in which PEFT does, which is not that of their
    places. It is no change of the weight, and a fresh delta changes the output; left out, the weight is turned."""
    block_dropout: Probability = 0.0
    """Part of the blocks, drawn anew in each forward, that turn nothing while training."""


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
        "coft": {True: "constraint: 0.00006"},
        "eps": "constraint",
        "module_dropout": "block_dropout",
    }
    training = frozenset({"block_dropout"})

    def dropout(self, params: OftParams) -> float:
        """Return the part of the blocks: by it, a formula sees whether the model trains."""
        return params.block_dropout

    def refuse(self, site: Site, params: OftParams) -> Refusal | None:
        """Take linear layers, embeddings and convolutions whose width the blocks fill."""
        if params.patches is not None and not self._fits_patches(site, params.patches):
            reason = f"patches {list(params.patches)} are for a called Conv2d of that kernel, not this {site.row.type}"
            return Refusal(reason, "leave patches out, or set it in overrides for what it is for")
        if params.block_dropout and self.lowers(site, params):
            reason = f"a convolution's weight is turned, so block_dropout has no place on this {site.row.type}"
            return Refusal(reason, "set block_dropout: 0 for this site in overrides")
        refusal = refuse_weight(site, "oft", dropout=params.block_dropout)
        return refusal or refuse_blocks(site, self._width(site, params), params.block_size)

    @staticmethod
    def _fits_patches(site: Site, patches: tuple[int, int]) -> bool:
        return site.kind == "conv" and site.host is None and site.row.shape_of("weight")[2:] == patches

    @staticmethod
    def _width(site: Site, params: OftParams) -> int:
        """Return the width of the vectors that are turned; a patch of the input has the channels of all groups."""
        return filter_width(site) * (1 if params.patches is None else site.row.conv_groups)

    def is_identity_at_start(self, params: OftParams) -> bool:
        """Return False for patches, whose overlaps are added up."""
        return params.patches is None

    def unmergeable(self, site: Site, params: OftParams) -> str | None:
        """Refuse patches."""
        return None if params.patches is None else "patches of the input are turned, not the weight"

    def tensors(self, site: Site, params: OftParams) -> tuple[TensorSpec, ...]:
        """Declare the upper triangles of the skew-symmetric blocks, `[blocks, size (size - 1) / 2]`."""
        size = params.block_size
        blocks = 1 if params.shared_blocks else self._width(site, params) // size
        return (TensorSpec("rotation", (blocks, size * (size - 1) // 2), Init("zeros")),)

    def lowers(self, site: Site, params: OftParams) -> bool:
        """Turn a convolution's patches in its weight."""
        return site.kind == "conv" and params.patches is None

    def reads_weight(self, site: Site, params: OftParams) -> bool:
        """Return True for convolutions, whose weight it turns."""
        return self.lowers(site, params)

    def apply(self, form: Form, params: OftParams, t: Any, x: Any, base: Callable[..., Any]) -> Any:
        """Compute base(x R); an embedding's output is turned instead."""
        probe = training(t, t.rotation) if params.block_dropout else None
        if form.kind == "embedding":
            return t.call(_turn, base(x), t.rotation, probe, params.block_dropout, *_form(params))
        if params.patches is not None:
            turned = t.call(_turn_patches, x, params.patches, t.rotation, probe, params.block_dropout, *_form(params))
            return base(turned)
        return base(t.call(_turn, x, t.rotation, probe, params.block_dropout, *_form(params)))

    def fold(self, site: Site, params: OftParams, t: Any, weights: Weights) -> Tensors:
        """Turn the weight."""
        weight = weights["weight"].to(t.rotation.dtype)
        blocks = _blocks(t.rotation, *_form(params))
        if site.kind == "embedding":
            return {"weight": rotate(weight, blocks)}
        rows = canonical(site.kind, weight)
        turned = rotate(rows.flatten(1), blocks.transpose(-2, -1)).reshape(rows.shape)
        return {"weight": own_layout(site.kind, turned)}


def _form(params: OftParams) -> tuple[int, str, int, float | None]:
    return params.block_size, params.transform, params.terms, params.constraint


def _blocks(entries: Tensor, size: int, transform: str, terms: int, constraint: float | None) -> Tensor:
    if constraint is not None:
        entries = entries + (_shortened(entries, constraint) - entries).detach()
    blocks = skew(entries, size)
    return cayley_neumann(blocks, terms) if transform == "cayley_neumann" else cayley(blocks)


def _shortened(entries: Tensor, longest: float) -> Tensor:
    """Shorten the entries of each block to its share of the norm; a skew-symmetric block has each entry twice."""
    most = longest / sqrt(2 * entries.shape[0])
    shortened: Tensor = entries * (most / entries.norm(dim=1, keepdim=True).clamp(min=most))
    return shortened


def _turn(x: Tensor, entries: Tensor, probe: Tensor | None, dropped: float, *form: Any) -> Tensor:
    blocks = _blocks(entries, *form)
    if probe is not None and blocks.shape[0] > 1:  # one block that is shared turns all, or nothing
        blocks = drop_blocks(probe, blocks[None], dropped)[0]
    return rotate(x, blocks)


def _turn_patches(x: Tensor, size: tuple[int, int], *turning: Any) -> Tensor:
    """Turn each patch of images `[batch, channels, height, width]`, and add them up as PEFT does.

    There, what fold takes as `[channels × patch, places]` holds `[channels, places × patch]`.
    """
    from torch.nn import functional as F

    batch, channels, height, width = x.shape
    patches = F.unfold(x, size).transpose(-2, -1)
    places = patches.shape[1]
    turned = _turn(patches, *turning).reshape(batch, places, channels, -1).transpose(1, 2)
    added: Tensor = F.fold(turned.reshape(batch, patches.shape[2], places), (height, width), size)
    return added
