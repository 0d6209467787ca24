"""Scale an update in a form that every compiler keeps.

Inductor takes `torch.add(y, u, alpha=s)`, where `y` or `u` is a product of matrices, for `addmm(y, …)` and loses `s`
(torch 2.13, hidden states `[positions, width]`). Formulas may say `alpha`; no graph that leaves here does.
"""

from __future__ import annotations

import torch
from torch import Tensor, fx


def add_scaled(y: Tensor, update: Tensor, scale: float) -> Tensor:
    """Return y + scale · update."""
    if torch.compiler.is_compiling():
        return y + scale * update
    return torch.add(y, update, alpha=scale)


def run(graph: fx.Graph) -> None:
    """Rewrite `torch.add(y, u, alpha=s)` and `y.add(u, alpha=s)`; without a scale they stay."""
    for node in list(graph.nodes):
        is_sum = node.target is torch.add if node.op == "call_function" else (node.op, node.target) == _METHOD
        if not is_sum or len(node.args) != 2 or node.kwargs.keys() != {"alpha"}:
            continue
        with graph.inserting_before(node):
            node.replace_all_uses_with(graph.call_function(add_scaled, (*node.args, node.kwargs["alpha"])))
        graph.erase_node(node)


_METHOD = ("call_method", "add")
