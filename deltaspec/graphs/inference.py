"""A linear host with a low-rank update where no gradients are recorded, in few calls: beside one token each counts.

y = W x + b + scale · up (down x). Of many rows, W + scale · up down is computed anew in each call and multiplied once:
for them it is cheaper than two more passes over what is as wide as the output. With few, the update is accumulated into
what the host gives.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional as F

from deltaspec.graphs.low_rank import MANY, merged, merging_pays
from deltaspec.graphs.modes import PLAIN, is_rewritten

_autocasts_anywhere = torch._C._is_any_autocast_enabled  # noqa: SLF001  # of any device, in one call


def without_gradients(
    host: Mapping[str, Tensor | None], x: Tensor, down: Tensor, up: Tensor, scale: float, transposed: bool
) -> Tensor | None:
    """Return W x + b + scale · up (down x); None where the host has to run as it is.

    `x` is `[…, in]`. `host` has the host's own parameters. `transposed`: W is `[in, out]`, as transformers' Conv1D has
    it.
    """
    if is_rewritten() or not x.numel():
        return None
    merges = merging_pays(x, down, up)
    if transposed and not merges:  # its own forward is as few calls
        return None
    weight, bias, dtype, dim = host.get("weight"), host.get("bias"), x.dtype, x.dim()
    if weight is None or type(weight) not in PLAIN or type(x) is not Tensor:
        return None
    if bias is not None and (type(bias) not in PLAIN or bias.dtype is not dtype):
        return None
    if weight.dtype is not dtype or down.dtype is not dtype or up.dtype is not dtype:
        return None
    if dim < 2 or not x.is_contiguous() or _autocasts_anywhere():
        return None
    if merges:
        return F.linear(x, merged(weight.t() if transposed else weight, down, up, scale), bias)
    if dim == 2:
        return _updated(x, weight, bias, down, up, scale)
    if dim == 3 and x.size(0) == 1:  # half as dear as two views
        return _updated(x[0], weight, bias, down, up, scale)[None]
    return _updated(x.view(-1, x.size(-1)), weight, bias, down, up, scale).view(*x.shape[:-1], -1)


def _updated(x: Tensor, weight: Tensor, bias: Tensor | None, down: Tensor, up: Tensor, scale: float) -> Tensor:
    """Return W x + b + scale · up (down x) of rows `[rows, in]`."""
    y = F.linear(x, weight, bias)
    narrow = F.linear(x, down) if x.size(0) < MANY else down.mm(x.t()).t()
    return y.addmm_(narrow, up.t(), alpha=scale)
