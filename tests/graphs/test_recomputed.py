"""Parts of formulas as one step of autograd: gradients are those of numbers, twice."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from deltaspec.graphs.recomputed import run_part


def test_what_enters_may_be_made_of_each_other():
    scale = nn.Parameter(torch.linspace(0.5, 2, 8, dtype=torch.float64))

    def part(y: Tensor, x: Tensor, scale: Tensor) -> tuple[Tensor, ...]:
        return y * x * scale, y.tanh()

    def through(x: Tensor, scale: Tensor) -> Tensor:
        one, other = run_part(part, True, 1, (x.sin(), x, scale), ())
        return one + other

    x = torch.linspace(-1, 2, 24, dtype=torch.float64).view(3, 8).requires_grad_()
    assert torch.autograd.gradcheck(through, (x, scale))
    assert torch.autograd.gradgradcheck(through, (x, scale))
