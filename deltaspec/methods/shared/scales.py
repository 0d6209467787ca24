"""Scaling what enters or leaves a module, and shifting what leaves it, as changes of its own parameters."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from deltaspec.methods.declarations import Site


def scale_outputs(weight: Tensor, scale: Tensor, site: Site) -> Tensor:
    """Scale a weight, in the host's own layout, by `[out]` so that every output is scaled."""
    if site.kind in ("conv1d", "embedding", "norm"):  # a LayerNorm's may have more dimensions than the last
        return weight * scale
    return weight * scale.reshape(-1, *(1,) * (weight.dim() - 1))


def shift_outputs(weights: Mapping[str, Tensor], shift: Tensor, site: Site) -> Tensor:
    """Return the bias that adds `[out]` to what leaves a module, which may have no bias yet."""
    if "bias" in weights:
        return weights["bias"] + shift
    return shift.expand_as(weights["weight"]) if site.kind == "norm" and "weight" in weights else shift


def scale_inputs(weight: Tensor, scale: Tensor, site: Site) -> Tensor:
    """Scale a weight, in the host's own layout, by `[in]` so that every input is scaled."""
    if site.kind == "conv1d":
        return weight * scale[:, None]
    if site.kind == "linear":
        return weight * scale
    # A group of a convolution sees its own slice of the input channels.
    out_channels, in_per_group, *kernel = weight.shape
    groups = site.row.conv_groups
    per_group = scale.reshape(groups, 1, in_per_group, *(1 for _ in kernel))
    return (weight.reshape(groups, out_channels // groups, in_per_group, *kernel) * per_group).reshape(weight.shape)
