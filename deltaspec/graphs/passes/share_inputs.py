"""Let the low-rank updates of sites that read one input (q, k and v; gate and up) share their first product: one
`[A_q; A_k; A_v] x`, which reads the wide input once instead of once a site.

Only a whole model's graph shows which sites read one input, so this works in the `symbolic` capture. The matrices are
joined in every call, so training in place is followed. Few rows gain nothing from it and keep the products apart.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from deltaspec.backbone.forwards import gives_new_tensor
from deltaspec.graphs.passes.fuse_addition import add_low_rank, add_low_rank_, add_product, add_product_
from deltaspec.graphs.passes.scope import Scope, result_is_new
from deltaspec.graphs.passes.share_products import Matrices, Scales, Strengths, add_low_ranks, add_low_ranks_, joined

_MANY = 32
"""Rows from which one product, its matrices joined first, is faster than one a site (measured with MKL, float32)."""


def narrow_products(x: Tensor, sites: tuple[Matrices, ...]) -> tuple[Tensor, ...]:
    """Return `x downᵀ` for each site, its matrices side by side: `x` is `[…, in]`, each site some `[rank, in]`."""
    if not torch.compiler.is_compiling() and x.numel() < _MANY * x.size(-1):
        return tuple(F.linear(x, downs[0] if len(downs) == 1 else torch.cat(downs)) for downs in sites)
    widths = [sum(down.size(0) for down in downs) for downs in sites]
    return torch.split(F.linear(x, torch.cat([down for downs in sites for down in downs])), widths, dim=-1)


@result_is_new
def add_products(y: Tensor, h: Tensor, ups: Matrices, scales: Scales, strengths: Strengths) -> Tensor:
    """Return y + Σ strength · scale · h upᵀ, where `h` has the narrow values of all updates side by side."""
    return add_product(y, h, joined(ups, scales, strengths), 1.0)


def run(scope: Scope, modules: Mapping[str, nn.Module]) -> None:
    """Share the first products of neighbours that read the same input; `modules` are those the graph calls, by FQN."""
    groups: dict[fx.Node, list[fx.Node]] = {}
    for node in list(scope.graph.nodes):
        if not _keeps_inputs(node, modules):
            for group in groups.values():
                _share(scope.graph, group)
            groups.clear()
        elif node.target in _SECOND:
            groups.setdefault(node.args[1], []).append(node)
    for group in groups.values():
        _share(scope.graph, group)


def _share(graph: fx.Graph, group: list[fx.Node]) -> None:
    if len(group) < 2:
        return
    first = group[0]
    sites: list[Any] = [node.args[2] if isinstance(node.args[2], tuple) else (node.args[2],) for node in group]
    for down in (down for downs in sites for down in downs):
        first.prepend(down)  # reads a parameter, so it can stand anywhere before
    with graph.inserting_before(first):
        products = graph.call_function(narrow_products, (first.args[1], tuple(sites)))
    for index, node in enumerate(group):
        y, _, _, *rest = node.args
        with graph.inserting_before(node):
            h = graph.call_function(operator.getitem, (products, index))
            node.replace_all_uses_with(graph.call_function(_SECOND[node.target], (y, h, *rest)))
        graph.erase_node(node)


_SECOND: dict[Any, Callable[..., Tensor]] = {
    add_low_rank: add_product, add_low_rank_: add_product_,
    add_low_ranks: add_products, add_low_ranks_: add_products,
}  # fmt: skip

_READERS = frozenset({"view", "reshape", "transpose", "permute", "flatten", "unflatten", "contiguous", "size", "dim"})
_GETTERS = (getattr, operator.getitem)


def _keeps_inputs(node: fx.Node, modules: Mapping[str, nn.Module]) -> bool:
    """Return whether a node is known not to write into tensors that were there before it.

    What could write, an activation in place, say, may change the input between two sites that read it.
    """
    if node.op == "call_module":
        module = modules.get(str(node.target))
        if module is None:  # a delta's dropout
            return True
        return gives_new_tensor(type(module)) and not (module._forward_pre_hooks or module._forward_hooks)
    if node.op == "call_method":
        return node.target in _READERS
    return node.op in ("placeholder", "get_attr") or node.target in _SECOND or node.target in _GETTERS
