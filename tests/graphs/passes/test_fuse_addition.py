"""The fused addition: the formula within round-off, its gradients, and in place only where it may be."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from low_rank import FORMS, ROUND_OFF, SHAPES, called, forms, graph_of, lora, operands, plain
from torch import Tensor
from torch.nn import functional as F

from deltaspec.graphs.passes.fuse_addition import add_low_rank_
from deltaspec.graphs.passes.run import run_passes
from deltaspec.graphs.row_ops import toward


@forms
@pytest.mark.parametrize("dtype", ROUND_OFF, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_fused_is_the_formula_within_round_off(form, shape, dtype):
    y, *rest = operands(shape, dtype)
    expected = plain(y, *rest, 1.5)
    with torch.no_grad():
        given = form(y.clone(), *rest, 1.5)
    assert given.shape == expected.shape and given.dtype == dtype
    torch.testing.assert_close(given, expected, rtol=ROUND_OFF[dtype], atol=ROUND_OFF[dtype])


@forms
@pytest.mark.parametrize("dtype", ROUND_OFF, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_fresh_delta_adds_nothing_to_the_bit(form, shape, dtype):
    y, x, down, up = operands(shape, dtype)
    for enabled in (False, True):
        with torch.set_grad_enabled(enabled):
            assert torch.equal(form(y.clone(), x, down, torch.zeros_like(up), 2.0), y)


@forms
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gradients_are_the_formulas(form, shape):
    found = []
    for function in (plain, form):
        y, *rest = operands(shape, torch.float64)
        leaves = [t.requires_grad_() for t in (y, *rest)]
        function(y * 1.0, *rest, 1.5).square().sum().backward()
        found.append([leaf.grad for leaf in leaves])
    for expected, given in zip(*found, strict=True):
        torch.testing.assert_close(given, expected, rtol=1e-12, atol=1e-12)


@forms
def test_only_what_may_be_overwritten_is(form):
    y, *rest = operands((2, 3, 5))
    kept = y.clone()
    with torch.no_grad():
        given = form(y, *rest, 1.5)
    in_place = form in (FORMS["add_low_rank_"], FORMS["add_product_"])
    assert (given is y) == in_place and torch.equal(y, kept) != in_place


@forms
def test_inputs_that_are_not_contiguous(form):
    y, x, down, up = operands((3, 4, 5))
    turned = x.transpose(0, 1)
    torch.testing.assert_close(
        form(y.transpose(0, 1), turned, down, up, 1.5), plain(y.transpose(0, 1), turned, down, up, 1.5)
    )
    with torch.no_grad():
        other = form(y.transpose(0, 1).clone(), turned, down, up, 1.5)
        torch.testing.assert_close(other, plain(y, x, down, up, 1.5).transpose(0, 1))


@forms
@pytest.mark.parametrize("shape", [(1, 1, 5), (2, 3, 5)], ids=str)
def test_autocast_and_mixed_dtypes_fall_back_to_the_formula(form, shape):
    y, *rest = operands(shape)
    for given in (y.bfloat16(), y):
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            expected = plain(given.clone(), *rest, 1.5)
            found = form(given.clone(), *rest, 1.5)
        assert found.dtype == expected.dtype
        torch.testing.assert_close(found, expected, rtol=5e-2, atol=5e-2)
    with torch.no_grad():  # torch promotes
        assert form(y.double(), *rest, 1.5).dtype == torch.float64


@forms
@pytest.mark.parametrize("shape", [(4, 1, 5), (4, 3, 5), (4, 2, 3, 5)], ids=str)
def test_mapped_over_a_batch(form, shape):
    _, x, down, up = operands(shape)
    weight = torch.randn(7, 5)

    def site(function: Any) -> Any:
        return lambda row: function(F.linear(row, weight), row, down, up, 1.5)

    with torch.no_grad():
        torch.testing.assert_close(torch.vmap(site(form))(x), site(plain)(x))
    _, given = torch.func.jvp(site(form), (x,), (x,))
    torch.testing.assert_close(given, torch.func.jvp(site(plain), (x,), (x,))[1])


@forms
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_strengths_are_exact_at_0_and_1(form, shape):
    y, x, down, up = operands(shape)

    def at(strength: float | None) -> Tensor:
        more = () if strength is None else (torch.tensor(strength),)
        return form(y.clone(), x, down, up, 1.5, *more)

    for enabled in (False, True):
        with torch.set_grad_enabled(enabled):
            assert torch.equal(at(0.0), y) and torch.equal(at(1.0), at(None))
            torch.testing.assert_close(at(0.3), torch.lerp(y, plain(y, x, down, up, 1.5), 0.3))


def test_a_strength_is_applied_to_the_narrow_values():
    graph = graph_of(lora, "x", "down", "up", "strength")
    [result] = graph.find_nodes(op="call_function", target=torch.add)
    [strength] = [node for node in graph.find_nodes(op="placeholder") if node.target == "strength"]
    with graph.inserting_after(result):
        scaled = graph.call_function(toward, (result.args[0], result, strength))
    result.replace_all_uses_with(scaled, delete_user_cb=lambda user: user is not scaled)
    run_passes(graph, True)
    graph.lint()
    assert called(graph) == ["base", "add_low_rank_"]
    [fused] = graph.find_nodes(op="call_function", target=add_low_rank_)
    assert [str(arg) for arg in fused.args] == ["base", "x", "down", "up", "2.0", "strength"]
