"""Steps that may not run again: whoever draws or writes in a formula has it run once."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import fx
from torch.nn import functional as F

from deltaspec.graphs.passes.recompute_parts import training_graph
from deltaspec.graphs.passes.repeatable import is_unrepeatable

REPEATED: dict[str, Callable[[Any], Any]] = {
    "activations": lambda h: F.relu(F.gelu(h)).tanh(),
    "products": lambda h: operator.matmul(h, h.t()) + F.linear(h, h) - h.sum(-1, keepdim=True),
    "no place of its own": lambda h: F.leaky_relu(h, 0.1, False) + F.silu(h, inplace=False),
}
ONCE: dict[str, Callable[[Any], Any]] = {
    "dropout": lambda h: F.dropout(h, 0.5),
    "noise": lambda h: h + torch.rand_like(h),
    "a method that draws": lambda h: h * h.bernoulli(),
    "a function of Python that draws": lambda h: F.gumbel_softmax(h),
    "one that draws by another": lambda h: F.dropout1d(h),
    "a method that writes": lambda h: h.relu_(),
    "a function that writes": lambda h: torch.relu_(h),
    "in place by name": lambda h: F.silu(h, inplace=True),
    "in place by order": lambda h: F.leaky_relu(h, 0.1, True),
    "into what is given": lambda h: torch.add(h, h, out=h),
    "into a part": lambda h: h.tracer.create_proxy("call_function", operator.setitem, (h, 0, 1), {}) + h,
}


def graph_of(step: Callable[[Any], Any]) -> fx.Graph:
    graph = fx.Graph()
    graph.placeholder("base")
    tracer = fx.proxy.GraphAppendingTracer(graph)
    x, down, up = (fx.Proxy(graph.placeholder(name), tracer) for name in ("x", "down", "up"))
    left = fx.Proxy(graph.call_module("base", (x.node,)), tracer)
    graph.output((left + F.linear(step(F.linear(torch.tanh(x), down)), up)).node)
    return graph


@pytest.mark.parametrize("name", REPEATED | ONCE)
def test_only_what_neither_draws_nor_writes_runs_again(name):
    graph = graph_of((REPEATED | ONCE)[name])
    assert any(map(is_unrepeatable, graph.nodes)) is (name in ONCE)
    assert (training_graph(graph, "x", ("down", "up"), (), False) is None) is (name in ONCE)
