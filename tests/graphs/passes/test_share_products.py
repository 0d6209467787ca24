"""Several updates of one input: their products are shared."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from low_rank import SHAPES, called, graph_of, lora, operands
from torch.nn import functional as F

from deltaspec.graphs.passes.fuse_addition import add_low_rank, add_low_rank_
from deltaspec.graphs.passes.run import run_passes
from deltaspec.graphs.passes.share_products import add_low_ranks, add_low_ranks_


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_updates_that_share_their_products(shape, overwrite):
    function, one = (add_low_ranks_, add_low_rank_) if overwrite else (add_low_ranks, add_low_rank)
    y, x, down, up = operands(shape, torch.float64)
    downs, ups = (down, torch.randn(3, 5).double()), (up, torch.randn(7, 3).double())
    for strengths in ((None, None), (None, torch.tensor(0.3)), (torch.tensor(0.0), torch.tensor(1.0))):
        for enabled in (False, True):
            with torch.set_grad_enabled(enabled):
                expected = y.clone()
                for each in zip(downs, ups, (1.5, 0.5), strengths, strict=True):
                    expected = one(expected, x, *each)
                given = function(y.clone(), x, downs, ups, (1.5, 0.5), strengths)
                torch.testing.assert_close(given, expected, rtol=1e-12, atol=1e-12)
    fresh = tuple(map(torch.zeros_like, ups))
    assert torch.equal(function(y.clone(), x, downs, fresh, (1.5, 0.5), (None, None)), y)


def test_only_updates_of_one_input_share():
    def twice(base: Any, x: Any, down: Any, up: Any, down_2: Any, up_2: Any) -> Any:
        return torch.add(lora(base, x, down, up), F.linear(F.linear(x, down_2), up_2))

    for owned, function in ((True, "add_low_ranks_"), (False, "add_low_ranks")):
        graph = graph_of(twice, "x", "down", "up", "down_2", "up_2")
        run_passes(graph, owned)
        graph.lint()
        assert called(graph) == ["base", function]
