"""The update of mixed rows under autograd: gradients, and gradients of gradients, are those of finite differences."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from deltaspec.graphs.row_update import RowUpdate

RUNS = ((0, 1, 1, 0.5), (1, 3, 2, 2.0), (3, 4, 0, 0.0), (4, 5, 1, 1.5))


def given() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(5, 2, 3), (5, 2, 4), (1, 4), (2, 4), (3, 1), (3, 2)]
    return [torch.randn(s, dtype=torch.double, generator=generator).requires_grad_() for s in shapes]


def update(y: torch.Tensor, x: torch.Tensor, *matrices: torch.Tensor) -> Any:
    return RowUpdate.apply(y, x, RUNS, *matrices)


def test_it_is_the_formula():
    y, x, down_1, down_2, up_1, up_2 = given()
    rows = [(0.5, down_1, up_1), (2.0, down_2, up_2), (2.0, down_2, up_2), (0.0, down_1, up_1), (1.5, down_1, up_1)]
    expected = torch.stack([y[n] + factor * (x[n] @ a.t() @ b.t()) for n, (factor, a, b) in enumerate(rows)])
    torch.testing.assert_close(update(y, x, down_1, down_2, up_1, up_2), expected)


def test_gradients_are_those_of_finite_differences():
    assert torch.autograd.gradcheck(update, given())
    assert torch.autograd.gradgradcheck(update, given())


@pytest.mark.parametrize("frozen", [0, 1, 2, 5])
def test_what_needs_no_gradient_gets_none(frozen):
    tensors = given()
    tensors[frozen].requires_grad_(False)
    update(*tensors).sum().backward()
    assert [n for n, tensor in enumerate(tensors) if tensor.grad is None] == [frozen]
    whole = given()
    update(*whole).sum().backward()
    for left, right in zip(tensors, whole, strict=True):
        assert left.grad is None or torch.equal(left.grad, right.grad)
