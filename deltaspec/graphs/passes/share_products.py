"""Let several low-rank updates of one site share their products: [A₁; A₂] x once, and one addition to the wide output.

The matrices are joined in every call, so training in place is followed; that costs values of the rank's size only. A
single row gains nothing from it and keeps the updates apart.
"""

from __future__ import annotations

import torch
from torch import Tensor, fx
from torch.nn import functional as F

from deltaspec.graphs.passes.fuse_addition import add_low_rank, add_low_rank_, add_product
from deltaspec.graphs.passes.scope import Scope, result_is_new

Matrices = tuple[Tensor, ...]
Scales = tuple[float, ...]
Strengths = tuple[Tensor | None, ...]


@result_is_new
def add_low_ranks(y: Tensor, x: Tensor, downs: Matrices, ups: Matrices, scales: Scales, strengths: Strengths) -> Tensor:
    """Return y + Σ strength · scale · (x downᵀ) upᵀ; see `add_low_rank`."""
    return add_product(y, F.linear(x, torch.cat(downs)), joined(ups, scales, strengths), 1.0)


@result_is_new
def add_low_ranks_(
    y: Tensor, x: Tensor, downs: Matrices, ups: Matrices, scales: Scales, strengths: Strengths
) -> Tensor:
    """Return y + Σ strength · scale · (x downᵀ) upᵀ; `y` may be overwritten."""
    if y.numel() == ups[0].size(0):
        for down, up, scale, strength in zip(downs, ups, scales, strengths, strict=True):
            y = add_low_rank_(y, x, down, up, scale, strength)
        return y
    return add_low_rank_(y, x, torch.cat(downs), joined(ups, scales, strengths), 1.0)


def joined(ups: Matrices, scales: Scales, strengths: Strengths) -> Tensor:
    """Return the wide matrices side by side, scaled: `[out, Σ rank]`."""
    parts = (up * scale for up, scale in zip(ups, scales, strict=True))
    return torch.cat([p if s is None else p * s for p, s in zip(parts, strengths, strict=True)], 1)


def run(scope: Scope) -> None:
    """Join chains of low-rank updates that read the same input."""
    joined: set[fx.Node] = set()
    for first in list(scope.graph.nodes):
        if first in joined or first.target not in _JOINT:
            continue
        chain = [first]
        while (after := _next(chain[-1])) is not None:
            chain.append(after)
        if len(chain) == 1:
            continue
        joined.update(chain)
        downs, ups, scales = (tuple(link.args[place] for link in chain) for place in (2, 3, 4))
        strengths = tuple(link.args[5] if len(link.args) > 5 else None for link in chain)
        with scope.graph.inserting_before(chain[-1]):
            given = (*first.args[:2], downs, ups, scales, strengths)
            chain[-1].replace_all_uses_with(scope.graph.call_function(_JOINT[first.target], given))
        for link in reversed(chain):
            scope.graph.erase_node(link)


_JOINT = {add_low_rank: add_low_ranks, add_low_rank_: add_low_ranks_}


def _next(node: fx.Node) -> fx.Node | None:
    """Return the update that alone reads this one's result, as what it adds to, and has the same input."""
    if len(node.users) != 1:
        return None
    [user] = node.users
    return user if user.target in _JOINT and user.args[:2] == (node, node.args[1]) else None
