"""Shapes that several methods ask for."""

from __future__ import annotations

from typing import Any

from deltaspec.backbone.table import Row
from deltaspec.methods.declarations import Form, Site

CHANNELS_FIRST_NORMS = ("_BatchNorm", "GroupNorm", "_InstanceNorm")


def output_width(row: Row) -> int:
    """Return the number of output features or channels of a linear, convolution, embedding or norm module."""
    return row.parameters[0].shape[-1] if row.out_features is None else row.out_features


def hidden_width(site: Site, position: str) -> int | None:
    """Return the width of the hidden state before or after a site; None where nothing tells it."""
    if position == "after":
        return site.width if site.width is not None else site.row.out_features
    if site.in_width is not None:
        return site.in_width
    return None if site.kind == "embedding" else site.row.in_features


def static_widths(row: Row) -> tuple[int | None, int | None]:
    """Return the widths of the hidden states that enter and leave, as far as the module itself tells, channels last."""
    if row.kind in ("linear", "conv1d"):
        return row.in_features, row.out_features
    if row.kind == "embedding":
        return None, row.out_features
    if row.kind == "norm" and set(row.bases).isdisjoint(CHANNELS_FIRST_NORMS) and row.has_parameter("weight"):
        return row.shape_of("weight")[-1], row.shape_of("weight")[-1]
    return None, None


def channels_first(site: Site) -> bool:
    """Return whether what leaves a convolution or a norm has its channels elsewhere than in the last dimension.

    A norm with a forward of its own does, unless it was seen to give `[batch, positions, width]`.
    """
    if site.kind == "norm" and not site.row.faithful and site.row.has_parameter("weight"):
        return site.dims != 3 or site.width != site.row.shape_of("weight")[-1]
    return site.kind == "conv" or not set(site.row.bases).isdisjoint(CHANNELS_FIRST_NORMS)


def along_channels(vector: Any, form: Form) -> Any:
    """Shape a `[channels]` vector so that it broadcasts over the output of a module of this form."""
    return vector.reshape(-1, *(1,) * form.channel_dims) if form.channel_dims else vector
