"""OpenDelta's low-rank adapter: a bottleneck whose projections are outer products."""

from __future__ import annotations

from typing import TYPE_CHECKING

from deltaspec.formats.incoming import IncomingSite
from deltaspec.formats.opendelta.saved import Saved
from deltaspec.formats.options import Options

if TYPE_CHECKING:
    from torch import Tensor

INFIXES = ("low_rank_adapter",)
NEEDS = "its non_linearity"


def read(saved: Saved, options: Options, part: str) -> None:
    """Add the delta."""
    options.ignore("low_rank_w_init", "reduction_factor")
    options.refuse("low_rank_rank", "OpenDelta multiplies its factors number by number, which is a product for rank 1 "
                   "alone", "save the delta again", unless=(None, 1))  # fmt: skip
    sites, width = [], 1
    for module, fqn in saved.sites("low_rank_adapter", options).items():
        tensors: dict[str, Tensor] = {}
        for way in ("down", "up"):
            lead = f"{module}.low_rank_adapter.{way}_sampler"
            left = saved.need(f"{lead}.W_left", f"{way}_right of {fqn}, transposed", (None, 1))
            right = saved.need(f"{lead}.W_right", f"{way}_left of {fqn}, transposed", (1, None))
            bias = saved.need(f"{lead}.b", f"{way}_bias of {fqn}", (None,))
            if left is not None and right is not None and bias is not None:
                tensors |= {f"{way}_left": right.t(), f"{way}_right": left.t(), f"{way}_bias": bias}
        if len(tensors) == 6:
            width = tensors["down_left"].shape[0]
            sites.append(IncomingSite(fqn, tensors))
    params = {"width": width, "rank": 1, "activation": saved.activation(options)}
    saved.add("low_rank_adapter", params, sites, part)
