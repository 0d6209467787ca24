"""Representation finetuning: a low-rank edit of the hidden state that leaves a block, at chosen positions."""

from __future__ import annotations

from collections.abc import Callable
from math import sqrt
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from deltaspec.methods.base import Method, Tensors, Weights
from deltaspec.methods.declarations import Form, Init, MethodParams, Promises, Refusal, Site, TensorSpec
from deltaspec.methods.shared.activations import Activation, activate
from deltaspec.methods.shared.bottleneck import refuse_serial
from deltaspec.methods.shared.positions import CACHES, MASK, edges, real_tokens
from deltaspec.methods.shared.precision import single
from deltaspec.methods.shared.rank import Rank
from deltaspec.methods.shared.shapes import hidden_width

if TYPE_CHECKING:
    from torch import Generator, Tensor

Count = Annotated[int, Field(ge=1, le=65536)]


class ReftParams(MethodParams):
    """Parameters of reft; without `first` and `last`, every position is edited."""

    rank: Rank = 4
    """Dimension of the subspace that is edited."""
    form: Literal["loreft", "direft"] = "loreft"
    """`loreft`: h + Rᵀ(W h + b - R h) with orthonormal rows R. `direft`: h + Rᵀ(W h + b) with any R."""
    first: Count | None = None
    """Edit this many positions from the first token on that is no padding."""
    last: Count | None = None
    """Edit this many positions up to the last token that is no padding. In generation these are the prompt's, as in the
    paper. Without a key-value cache, generate by the compiled model's own `generate`."""
    tied: bool = True
    """One edit for the first and the last positions; false: one for each of the two ends."""
    padding: Literal["mask", "none"] = "mask"
    """How padding is told: by the attention mask that the block is called with (no mask: no padding), or that there is
    `none`, for blocks that take no mask."""
    activation: Activation = "identity"
    """Activation on W h + b."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Probability of dropping an entry of the edit, in the subspace, while training."""

    @model_validator(mode="after")
    def _two_ends(self) -> Self:
        if not self.tied and (self.first is None or self.last is None):
            raise ValueError("tied: false needs both first and last")
        return self

    @property
    def ends(self) -> tuple[str, ...]:
        """Prefixes of the tensors' names, one for each edit of its own."""
        return ("",) if self.tied else ("first_", "last_")


class Reft(Method):
    """LoReFT and DiReFT."""

    name = "reft"
    summary = "low-rank edits of hidden states at chosen positions"
    paper = "ReFT: Representation Finetuning for Language Models (arXiv:2404.03592)"
    Params = ReftParams
    promises = Promises(identity_at_start=False, weight=None, per_row=True)
    default_roles = ("block",)
    small = {"rank": 2}
    foreign = {
        "low_rank_dimension": "rank",
        "prefix_positions": "first",
        "suffix_positions": "last",
        "tied_weights": "tied",
        **{key: {True: "form: loreft", False: "form: direft"} for key in ("orthogonality", "subtract_projection")},
    }

    def refuse(self, site: Site, params: ReftParams) -> Refusal | None:
        """Take hidden states in the last dimension, and for chosen positions a module that is told of padding."""
        if refusal := refuse_serial(self.name, site, "after"):
            return refusal
        width = hidden_width(site, "after")
        assert width is not None
        if params.rank > width:
            return Refusal(f"rank {params.rank} is more than the hidden width {width}", f"use a rank up to {width}")
        if self._chooses(params) and site.dims not in (None, 3):
            return Refusal(
                f"the hidden state after this {site.row.type} has {site.dims} dimensions; positions are chosen in "
                "[batch, positions, width]",
                "edit all positions (no `first`, no `last`), or select other modules",
            )
        if self._chooses(params) and params.padding == "mask" and MASK not in site.row.arguments:
            return Refusal(
                f"{site.row.type} is not called with an attention_mask, so that padding cannot be told from tokens",
                "select whole blocks (role: block), edit all positions (no `first`, no `last`), or set padding: none "
                "where inputs are never padded",
            )
        return None

    @staticmethod
    def _chooses(params: ReftParams) -> bool:
        return params.first is not None or params.last is not None

    def ends_matter(self, params: ReftParams) -> bool:
        """Count the last tokens from the prompt's end."""
        return params.last is not None

    def arguments(self, site: Site, params: ReftParams) -> tuple[str, ...]:
        """Ask for the mask, and for the cache, which tells how many tokens came before."""
        return (MASK, *CACHES) if self._chooses(params) and site.kind == "other" else ()

    def tensors(self, site: Site, params: ReftParams) -> tuple[TensorSpec, ...]:
        """Declare R, `rotation`, and W, `source`, both `[rank, hidden]`, and b, `bias`; one set for each end."""
        width = hidden_width(site, "after")
        assert width is not None
        shape, start = (params.rank, width), Init("kaiming_uniform", sqrt(5))
        parts = {"rotation": (shape, start), "source": (shape, start), "bias": ((params.rank,), Init("zeros"))}
        return tuple(TensorSpec(end + name, *declared) for end in params.ends for name, declared in parts.items())

    def initialise(self, site: Site, params: ReftParams, weights: Weights, generator: Generator) -> Tensors:
        """Start R of `loreft` with random orthonormal rows."""
        import torch

        if params.form == "direft":
            return {}
        width = hidden_width(site, "after")
        assert width is not None
        drawn = {f"{end}rotation": torch.randn(params.rank, width, generator=generator) for end in params.ends}
        return {name: _orthonormal(rows) for name, rows in drawn.items()}

    def apply(self, form: Form, params: ReftParams, t: Any, x: Any, base: Callable[..., Any]) -> Any:
        """Compute h + edit(h) at the chosen positions of h = base(x)."""
        h = base(x)
        if not self._chooses(params):
            return h + _edit(t, "", h, params)
        # Asked after the call: by then the cache holds what this forward brings.
        told = params.padding == "mask"
        mask, caches = t.argument(MASK) if told else None, [t.argument(name) for name in CACHES]
        real = t.call(real_tokens, h, params.last is not None, mask, *caches)
        chosen = t.call(edges, real, h, params.first, params.last)
        if params.tied:
            return h + (chosen[0] + chosen[1]) * _edit(t, "", h, params)
        return h + chosen[0] * _edit(t, "first_", h, params) + chosen[1] * _edit(t, "last_", h, params)


def _edit(t: Any, end: str, h: Any, params: ReftParams) -> Any:
    from torch.nn import functional as F

    rotation, source, bias = (getattr(t, end + name) for name in ("rotation", "source", "bias"))
    if params.form == "loreft":
        rotation = t.call(_orthonormal, rotation)
        change = activate(params.activation, F.linear(h, source, bias)) - F.linear(h, rotation)
    else:
        change = activate(params.activation, F.linear(h, source, bias))
    return F.linear(t.dropout(change), rotation.t())


def _orthonormal(rows: Tensor) -> Tensor:
    """Make rows orthonormal by Gram and Schmidt; orthonormal rows stay what they are, up to round-off."""
    import torch

    columns, triangle = torch.linalg.qr(single(rows).t())
    # QR leaves the columns' signs open; with those of R's diagonal it is the Gram-Schmidt process.
    turned: Tensor = (columns * torch.diagonal(triangle).sign()).t()
    return turned.to(rows.dtype)
