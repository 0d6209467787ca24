"""A low-rank site as one step of autograd: its gradients are those of plain torch, and those of numbers."""

from __future__ import annotations

import functools

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from deltaspec.graphs import low_rank
from deltaspec.graphs.low_rank import LowRankStep, Step
from deltaspec.graphs.recipes import recipe_of
from deltaspec.graphs.remade import remade


def values(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


WEIGHT, BIAS = values(5, 6, seed=1), values(5, seed=2)


def step(x: Tensor, down: Tensor, up: Tensor, dropout: float = 0.0, bias: Tensor | None = BIAS) -> Tensor:
    base = functools.partial(F.linear, weight=WEIGHT, bias=bias)
    given = Step(base, WEIGHT, bias, 1.5, dropout, x.dtype)
    return LowRankStep.apply(given, x, down, up)


def plain(x: Tensor, down: Tensor, up: Tensor, dropout: float = 0.0, bias: Tensor | None = BIAS) -> Tensor:
    return F.linear(x, WEIGHT, bias) + 1.5 * F.linear(F.linear(F.dropout(x, dropout), down), up)


def leaves(rows: int = 4) -> tuple[Tensor, ...]:
    return tuple(v.requires_grad_() for v in (values(2, rows, 6), values(3, 6, seed=3), values(5, 3, seed=4)))


@pytest.mark.parametrize("merged", [False, True])
def test_gradients_are_those_of_numbers_twice(merged, monkeypatch):
    monkeypatch.setattr(low_rank, "PAYS", 0 if merged else 1000)
    assert torch.autograd.gradcheck(step, leaves())
    assert torch.autograd.gradgradcheck(step, leaves())


@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("trained", [(True, False, False), (False, True, False), (False, False, True), (True,) * 3])
def test_any_part_may_be_without_gradients(trained, merged, monkeypatch):
    monkeypatch.setattr(low_rank, "PAYS", 0 if merged else 1000)
    given = [v.requires_grad_(wanted) for v, wanted in zip(leaves(), trained, strict=True)]
    wanted = [v for v in given if v.requires_grad]
    weights = values(2, 4, 5, seed=9)
    ours = torch.autograd.grad((step(*given) * weights).sum(), wanted)
    theirs = torch.autograd.grad((plain(*given) * weights).sum(), wanted)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("rows", [1, 4, 40])
def test_dropout_is_torchs_own_with_the_same_seed(rows):
    given, weights = leaves(rows), values(2, rows, 5, seed=9)
    found = []
    for function in (step, plain):
        torch.manual_seed(3)
        y = function(*given, dropout=0.3)
        found.append((y, *torch.autograd.grad((y * weights).sum(), given)))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)


def test_half_precision_is_never_merged(monkeypatch):
    monkeypatch.setattr(low_rank, "PAYS", 0)
    weight = torch.full((4, 4), 256.0, dtype=torch.bfloat16)
    down, up = torch.eye(4, dtype=torch.bfloat16), torch.eye(4, dtype=torch.bfloat16) * 0.5  # lost beside 256
    base = functools.partial(F.linear, weight=weight)
    x = torch.tensor([[1.0, -1.0, 0.0, 0.0]], dtype=torch.bfloat16).requires_grad_()
    y = LowRankStep.apply(Step(base, weight, None, 1.0, 0.0, x.dtype), x, down, up)
    assert y[0].tolist() == [0.5, -0.5, 0.0, 0.0]


def test_a_fresh_update_changes_no_bit_even_when_merged(monkeypatch):
    x, down, up = (v.float() for v in leaves())
    weight = WEIGHT.float()
    base = functools.partial(F.linear, weight=weight)
    for pays in (0, 1000):
        monkeypatch.setattr(low_rank, "PAYS", pays)
        y = LowRankStep.apply(
            Step(base, weight, None, 1.5, 0.0, x.dtype), x, down.requires_grad_(), torch.zeros_like(up)
        )
        assert torch.equal(y, F.linear(x, weight))


def test_what_leaves_may_be_overwritten():
    given, weights = leaves(), values(2, 4, 5, seed=9)
    found = []
    for function in (step, plain):
        y = function(*given)
        y[:, 0] = 0
        found.append(torch.autograd.grad((y.mul_(weights) + y.relu_()).sum(), given))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)


def test_x_may_be_made_of_what_depends_on_each_other():
    x, down, up = leaves()
    base = functools.partial(F.linear, weight=WEIGHT)

    def through(x: Tensor, down: Tensor, up: Tensor) -> Tensor:
        x = F.silu(torch.sin(x)) * x
        recipe = recipe_of(x, True, base)
        assert recipe is not None
        given = Step(base, WEIGHT, None, 1.5, 0.0, x.dtype, recipe.steps, recipe.kept, remade(x.grad_fn))
        return LowRankStep.apply(given, x, down, up)

    assert torch.autograd.gradcheck(through, (x, down, up))
    assert torch.autograd.gradgradcheck(through, (x, down, up))


def test_what_a_selective_checkpoint_keeps_is_not_overwritten():
    def keep(context: object, operator: object, *given: object, **more: object) -> CheckpointPolicy:
        return CheckpointPolicy.MUST_SAVE if "mm" in str(operator) else CheckpointPolicy.PREFER_RECOMPUTE

    given, weights = leaves(), values(2, 4, 5, seed=9)
    contexts = functools.partial(create_selective_checkpoint_contexts, keep)
    y = checkpoint(step, *given, use_reentrant=False, context_fn=contexts)
    ours = torch.autograd.grad((y * weights).sum(), given)
    for one, other in zip(ours, torch.autograd.grad((plain(*given) * weights).sum(), given), strict=True):
        torch.testing.assert_close(one, other)


def test_the_hosts_weight_is_kept_for_the_gradient_of_what_enters_alone():
    x, down, up = leaves()
    assert step(x, down, up).grad_fn.saved_tensors[0] is WEIGHT
    assert step(x.detach(), down, up).grad_fn.saved_tensors[0] is None
