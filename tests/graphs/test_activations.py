"""Activations: alone and in front of a gate they have torch's own values and gradients, and keep what entered."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from training import kept_bytes, serve_small
from transformers.activations import ACT2FN

from deltaspec.graphs.activations import Activation, Gate, activate
from deltaspec.graphs.elementwise import kind_of


def run(module: nn.Module, x: Tensor, known: Activation | None = None) -> Tensor:
    return activate(module.forward, module, known or Activation(), x)


def leaf(seed: int) -> Tensor:
    return torch.randn(3, 8, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).requires_grad_()


@pytest.fixture(autouse=True)
def _small(monkeypatch):
    serve_small(monkeypatch)


@pytest.mark.parametrize("name", ["silu", "gelu", "gelu_new", "quick_gelu", "mish", "relu", "tanh", "relu2"])
def test_gradients_are_those_of_numbers_twice(name):
    module = ACT2FN[name]

    def alone(x: Tensor) -> Tensor:
        return run(module, x) + 0

    def gated(g: Tensor, u: Tensor) -> Tensor:
        return run(module, g) * u

    assert torch.autograd.gradcheck(alone, leaf(1))
    assert torch.autograd.gradgradcheck(alone, leaf(1))
    assert torch.autograd.gradcheck(gated, (leaf(1), leaf(2)))
    assert torch.autograd.gradgradcheck(gated, (leaf(1), leaf(2)))
    assert torch.equal(gated(leaf(1), leaf(2)), module(leaf(1)) * leaf(2))


def test_kinds():
    assert kind_of(nn.SiLU()) == kind_of(ACT2FN["gelu"]) == "simple"
    assert kind_of(ACT2FN["gelu_new"]) == "compound"
    for module in (nn.ReLU(), nn.Tanh(), nn.Dropout(), nn.SiLU(inplace=True), nn.ReLU6(inplace=True), nn.PReLU()):
        assert kind_of(module) is None
    for kind in (nn.Softmax, nn.GLU):
        assert kind_of(kind(-1)) is None


@pytest.mark.parametrize("name", ["silu", "gelu_new"])
def test_a_gated_feed_forward_keeps_what_entered(name):
    module, known = ACT2FN[name], Activation()

    class Block(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return run(module, x * 1, known) * super().forward(x)

    x = torch.randn(16, 64, requires_grad=True)
    block = Block(64, 64).requires_grad_(False)
    assert kept_bytes(block, x) == 3 * 16 * 64 * 4  # g, u, and the weights of the loss
    assert known.gates is True


def test_anything_else_is_done_to_the_plain_tensor():
    known = Activation()
    given = run(nn.SiLU(), leaf(1) * 1, known)
    assert type(given) is Gate and given.shape == (3, 8) and given.dtype is torch.float64
    assert known.gates is None  # its form says nothing yet
    weight = torch.randn(4, 8, dtype=torch.float64)
    assert type(F.linear(given, weight)) is Tensor and known.gates is False
    assert type(run(nn.SiLU(), leaf(1) * 1, known)) is Tensor


@pytest.mark.parametrize("other", [torch.tensor(2.0), torch.ones(8, dtype=torch.float64), 3.0])
def test_products_with_what_needs_no_gradient_are_torchs_own(other):
    given = run(nn.SiLU(), leaf(1) * 1)
    assert (given * other).grad_fn.name() == "MulBackward0"
    assert torch.equal(other * given, F.silu(leaf(1)) * other)


def test_whoever_watches_gradients_still_sees_them():
    g, u = leaf(1), leaf(2)
    given = run(nn.SiLU(), g * 1)
    given.register_hook(lambda gradient: gradient * 2)
    product = given * u
    product.retain_grad()
    product.sum().backward()
    plain = torch.autograd.grad((F.silu(g) * u).sum(), (g, u))
    assert torch.equal(product.grad, torch.ones_like(u))
    torch.testing.assert_close((g.grad, u.grad), (plain[0] * 2, plain[1]))


def test_a_gate_made_of_what_it_multiplies():
    def gated(u: Tensor) -> Tensor:
        u = u * 1
        return run(nn.SiLU(), u.sin()) * u

    assert torch.autograd.gradcheck(gated, leaf(1)) and torch.autograd.gradgradcheck(gated, leaf(1))


def test_what_is_overwritten_before_the_product_is_multiplied_as_it_is():
    g, u = leaf(1), leaf(2)
    given = run(nn.SiLU(), g * 1)
    given.data.mul_(2)
    product = given * u
    assert torch.equal(product, F.silu(g) * 2 * u)
    assert torch.equal(torch.autograd.grad(product.sum(), u)[0], F.silu(g) * 2)
    entered = g * 1
    given = run(nn.SiLU(), entered)
    entered.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        (given * u).sum().backward()


def test_writing_into_it_writes_into_the_tensor():
    given = run(nn.SiLU(), leaf(1) * 1)
    given.mul_(leaf(2))
    (given + 0).sum().backward()
    assert torch.equal(given + 0, F.silu(leaf(1)) * leaf(2))


def test_without_gradients_and_with_hooks_it_is_the_module_that_runs():
    module, known = nn.SiLU(), Activation()
    with torch.no_grad():
        assert type(run(module, leaf(1), known)) is Tensor
    assert type(run(module, leaf(1).detach(), known)) is Tensor
    module.register_forward_hook(lambda *_: None)
    assert type(run(module, leaf(1), known)) is Tensor and not known.looked


@pytest.mark.parametrize("name", ["silu", "gelu_new"])
def test_checkpointing_finds_what_it_kept_when_hooks_are_gone(name):
    module, known = ACT2FN[name], Activation()

    def part(g: Tensor, u: Tensor) -> Tensor:
        return run(module, g * 1, known) * (u * 1)

    g, u = leaf(1), leaf(2)
    hook = module.register_forward_hook(lambda *_: None)
    y = checkpoint(part, g, u, use_reentrant=False)
    hook.remove()
    ours = torch.autograd.grad(y.sum(), (g, u))
    torch.testing.assert_close(ours, torch.autograd.grad((module(g) * u).sum(), (g, u)))


def test_forward_mode_differentiates_the_module():
    with forward_ad.dual_level():
        given = run(nn.SiLU(), forward_ad.make_dual(leaf(1), leaf(2).detach()))
        tangent = forward_ad.unpack_dual(given).tangent
    wanted = torch.func.jvp(F.silu, (leaf(1).detach(),), (leaf(2).detach(),))[1]
    torch.testing.assert_close(tangent, wanted)
