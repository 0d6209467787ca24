"""What a formula adds keeps its scale: under Inductor's passes, which lose `alpha` beside a product of matrices."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from inductor import inductor_passes
from low_rank import called, graph_of
from torch import fx, nn
from torch.nn import functional as F

from deltaspec.graphs.passes import keep_scales
from deltaspec.graphs.passes.run import run_passes


def scaled(base: Any, x: Any, weight: Any) -> Any:
    return torch.add(base(x), torch.tanh(F.linear(x, weight)), alpha=3.0)


def method(base: Any, x: Any, weight: Any) -> Any:
    return base(x).add(F.linear(torch.tanh(x), weight), alpha=3.0)


def product(base: Any, x: Any, weight: Any) -> Any:
    return torch.add(base(x), F.linear(x, weight), alpha=3.0)


@pytest.mark.parametrize("formula", [scaled, method, product])
def test_inductor_keeps_the_scale(formula):
    torch._dynamo.reset()
    graph = graph_of(formula, "x", "weight")
    run_passes(graph)
    assert not any("alpha" in node.kwargs for node in graph.nodes)
    base, weight, x = nn.Linear(5, 5, bias=False), torch.randn(5, 5), torch.randn(3, 5)
    module = fx.GraphModule({"base": base}, graph)
    torch.testing.assert_close(torch.compile(module, backend=inductor_passes)(x, weight), formula(base, x, weight))


def test_sums_without_a_scale_stay():
    graph = graph_of(lambda base, x, y: torch.add(base(x), torch.tanh(y)), "x", "y")
    keep_scales.run(graph)
    assert called(graph) == ["base", "tanh", "add"]
