"""The backbone's own dropouts with masks in bits."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from training import serve_small

from deltaspec.graphs.dropouts import drop


def leaf(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64).requires_grad_()


@pytest.mark.parametrize("shape", [(3, 8), (3, 7), (2, 3, 4)])
def test_values_and_gradients_are_torchs_own_with_the_same_seed(shape, monkeypatch):
    serve_small(monkeypatch)
    module = nn.Dropout(0.3)
    for x in (leaf(*shape), leaf(*shape).detach().transpose(0, 1).requires_grad_()):
        found = []
        for run in (lambda v: drop(module.forward, module, v), module):
            torch.manual_seed(5)
            y = run(x)
            found.append((y, *torch.autograd.grad(y.square().sum(), x)))
        for ours, theirs in zip(*found, strict=True):
            torch.testing.assert_close(ours, theirs)


def test_gradients_are_those_of_numbers_twice(monkeypatch):
    serve_small(monkeypatch)
    module = nn.Dropout(0.3)

    def dropped(x: Tensor) -> Tensor:
        torch.manual_seed(2)
        return drop(module.forward, module, x)

    assert torch.autograd.gradcheck(dropped, (leaf(3, 8),))
    assert torch.autograd.gradgradcheck(dropped, (leaf(3, 8),))


def test_in_evaluation_and_in_place_it_is_torchs_own():
    x = leaf(400, 400)
    assert drop(nn.Dropout(0.3).eval().forward, nn.Dropout(0.3).eval(), x) is x
    module = nn.Dropout(0.3, inplace=True)
    assert drop(module.forward, module, x * 1).grad_fn.name() != "DropStepBackward"
    assert drop(nn.Dropout(0.3).forward, nn.Dropout(0.3), x).grad_fn.name() == "DropStepBackward"
