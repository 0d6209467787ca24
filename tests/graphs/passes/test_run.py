"""Passes over region graphs: the values stay, only what is proven new is overwritten, the host's code is left alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from low_rank import Net, called, compiled, graph_of, lora, reference
from torch import Tensor
from torch.nn import functional as F

from deltaspec.graphs.passes.run import run_passes


def test_overwriting_needs_an_owned_value_that_nobody_reads_again():
    names = ("x", "down", "up")
    for owned, function in ((True, "add_low_rank_"), (False, "add_low_rank")):
        graph = graph_of(lora, *names)
        run_passes(graph, owned)
        graph.lint()
        assert called(graph) == ["base", function]

    def read_again(base: Any, x: Any, down: Any, up: Any) -> Any:
        y = base(x)
        return torch.lerp(y, torch.add(y, F.linear(F.linear(x, down), up), alpha=2.0), 0.5)

    graph = graph_of(read_again, *names)
    run_passes(graph, True)
    assert called(graph) == ["base", "add_low_rank", "lerp"]

    def narrow_is_read(base: Any, x: Any, down: Any, up: Any) -> Any:
        h = F.linear(x, down)
        return torch.add(base(x), F.linear(h, up)), h

    graph = graph_of(narrow_is_read, *names)
    run_passes(graph, True)
    assert called(graph) == ["linear", "base", "add_product_"]

    def of_the_host(base: Any, x: Any, weight: Any) -> Any:
        return torch.add(base(x), F.linear(x, x))

    graph = graph_of(of_the_host, "x", "weight")
    run_passes(graph, home="deltaspec")
    assert called(graph) == ["base", "linear", "add"]


def chained(base: Any, x: Any, down: Any, up: Any, down_2: Any, up_2: Any) -> Any:
    return torch.add(lora(base, x, down, up), F.linear(F.linear(x.to(torch.float32), down_2), up_2))


def test_a_chain_accumulates_into_one_tensor():
    graph = graph_of(chained, "x", "down", "up", "down_2", "up_2")
    run_passes(graph, True)
    assert called(graph) == ["base", "add_low_rank_", "add_low_rank_"]


@pytest.mark.parametrize("capture", ["modules", "symbolic"])
@pytest.mark.parametrize("shape", [(1, 5), (4, 5), (1, 1, 5), (2, 3, 5), (5,)], ids=str)
def test_two_deltas_on_one_site(capture, shape):
    c, x = compiled(capture), torch.randn(shape)
    assert "add_low_rank" in next(iter(c.regions.values())).code
    with torch.no_grad():
        torch.testing.assert_close(c(x), reference(c, x), rtol=1e-4, atol=1e-4)
        c.only("b")
        torch.testing.assert_close(c(x), reference(c, x, ("b",)), rtol=1e-4, atol=1e-4)
    c.attach()
    given = torch.autograd.grad(c(x).square().sum(), list(c.trainable_parameters()))
    expected = torch.autograd.grad(reference(c, x).square().sum(), list(c.trainable_parameters()))
    for one, other in zip(given, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4 * float(other.abs().max()))


@pytest.mark.parametrize("capture", ["modules", "symbolic"])
def test_what_hooks_keep_is_not_overwritten(capture):
    c, x = compiled(capture), torch.randn(2, 3, 5)
    kept: list[tuple[Tensor, Tensor]] = []
    c.backbone.first.register_forward_hook(lambda module, given, output: kept.append((output, output.clone())))
    with torch.no_grad():
        c(x)
    assert kept and all(torch.equal(held, copied) for held, copied in kept)


def test_a_forward_of_another_library_keeps_its_output():
    model = Net()
    held: list[Tensor] = []
    own = model.first.forward

    def keeping(x: Tensor) -> Tensor:
        held.append(own(x))
        return held[-1]

    model.first.forward = keeping  # type: ignore[method-assign]
    c, x = compiled(model=model), torch.randn(2, 3, 5)
    with torch.no_grad():
        c(x)
    assert torch.equal(held[-1], F.linear(x, model.first.weight, model.first.bias))


def test_both_ways_of_compiling_agree():
    c, x = compiled(), torch.randn(2, 3, 5)
    with torch.no_grad():
        expected = c(x)
        torch.testing.assert_close(torch.compile(c, fullgraph=True, backend="eager")(x), expected)
        program = c.export((x,), dynamic_shapes=({0: torch.export.Dim("batch"), 1: torch.export.Dim("tokens")},))
        for size in ((1, 1), (2, 3), (9, 8)):
            if size != (1, 1):
                rows = torch.randn(*size, 5)
                torch.testing.assert_close(program.module()(rows), c(rows))
