"""Recipes: what is made again equals what there was, and nothing is read that should not be."""

from __future__ import annotations

import weakref
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

from deltaspec.graphs import recipes
from deltaspec.graphs.activations import Recomputed
from deltaspec.graphs.recipe_steps import make
from deltaspec.graphs.recipes import recipe_of


class Site:
    """What reads an input."""


def leaf(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).requires_grad_()


A, B = leaf(2, 3, 8, seed=1), leaf(2, 3, 8, seed=2)
WEIGHT, SHIFT = torch.linspace(0.5, 2, 8), torch.linspace(-1, 1, 8)


def rms(x: Tensor) -> Tensor:
    return WEIGHT * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)).to(torch.float32)


def attended(q: Tensor) -> Tensor:
    heads = q.view(2, 3, 2, 4).transpose(1, 2)
    return F.scaled_dot_product_attention(heads, heads, heads).transpose(1, 2)


MADE: dict[str, Callable[[], Tensor]] = {
    "gate": lambda: F.silu(A * 1) * (B * 1),
    "gate of gelu, dropped": lambda: F.dropout(F.gelu(A * 1, approximate="tanh") * (B * 1), 0.5),
    "gelu": lambda: F.gelu(A * 1),
    "relu, dropped": lambda: F.dropout(F.relu(A * 1), 0.5),
    "layer norm": lambda: F.layer_norm(A * 1, (8,), WEIGHT, SHIFT),
    "layer norm of two dimensions, bare": lambda: F.layer_norm(A * 1, (3, 8)),
    "root mean square norm": lambda: rms(A * 1),
    "torch's root mean square norm": lambda: F.rms_norm(A * 1, (8,), WEIGHT),
    "its half precision": lambda: rms(A * 1).to(torch.bfloat16),
    "fused dropout": lambda: torch.native_dropout(F.gelu(A * 1), 0.5, True)[0],
    "recomputed": lambda: Recomputed.apply(torch.sin, A * 1) * 2,
}


@pytest.mark.parametrize("name", MADE)
@pytest.mark.parametrize("absorb", [False, True])
def test_what_is_made_again_is_what_there_was(name, absorb):
    x = MADE[name]()
    recipe = recipe_of(x, absorb, Site())
    assert recipe is not None
    with torch.no_grad():
        made = make(recipe.steps, recipe.kept)
    assert made.dtype is x.dtype and made.shape == x.shape
    torch.testing.assert_close(made, x.detach(), rtol=1e-5, atol=1e-6)
    assert all(tensor.untyped_storage().data_ptr() != x.untyped_storage().data_ptr() for tensor in recipe.kept)


def test_attention_whose_output_is_copied_is_made_of_it():
    shared, copied = attended(A * 1).reshape(2, 3, 8), attended(A * 1)[:, :, :1].expand(2, 3, 2, 4).reshape(2, 3, 8)
    assert recipe_of(shared, True, Site()) is None  # the same memory
    assert recipe_of(copied, True, Site()) is None  # not known


@pytest.mark.parametrize("name", ["silu", "gelu"])
def test_a_gate_lets_go_of_what_it_can_make_again(name):
    found = []
    for absorb in (False, True):
        activated = getattr(F, name)(A * 1)
        x, held = activated * (B * 1), weakref.ref(activated)
        del activated
        recipe = recipe_of(x, absorb, Site())
        assert (held() is None) is absorb
        [gradient] = torch.autograd.grad(x.square().sum(), A, create_graph=True)
        found.append((gradient, *torch.autograd.grad(gradient.square().sum(), (A, B))))
        assert len(recipe.kept) == 2
    assert all(map(torch.equal, *found))


def test_a_gate_whose_sources_are_overwritten_says_so():
    gate = A * 1
    x = F.silu(gate) * (B * 1)
    assert recipe_of(x, True, Site()) is not None
    with torch.no_grad():
        gate.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(x.sum(), B)


@pytest.mark.parametrize("then", [lambda h: F.dropout(h, 0.5), torch.clone, lambda h: h * (B * 1), lambda h: h])
def test_what_was_overwritten_unseen_is_not_made_again(then):
    site = Site()
    for _ in range(2):
        h = F.silu(A * 1)
        h.data[0] = 0
        assert recipe_of(then(h), True, site) is None


def test_nothing_is_made_again_where_that_saves_nothing_or_is_not_known():
    changed = A * B
    with torch.no_grad():
        changed.mul_(2)
    overwritten = A * 1
    product = F.silu(overwritten) * (B * 1)
    with torch.no_grad():
        overwritten.add_(1)
    for x in (A, A.detach(), (A * 1).sin(), changed, product, F.relu(A * 1)):
        assert recipe_of(x, True, Site()) is None


def test_tensors_without_values_are_made_again_as_others_would():
    g = torch.empty(3, 8, device="meta", requires_grad=True)
    recipe = recipe_of(F.gelu(g * 1), True, Site())
    assert recipe is not None and make(recipe.steps, recipe.kept).shape == (3, 8)


def test_whoever_watches_gradients_still_sees_them():
    for _ in range(2):
        activated = F.silu(A * 1)
        product = activated * (B * 1)
        assert recipe_of(product, True, Site()) is not None
        seen: list[Tensor] = []
        activated.register_hook(seen.append)
        product.retain_grad()
        product.sum().backward()
        assert torch.equal(seen[0], B) and torch.equal(product.grad, torch.ones_like(B))


def test_second_derivatives_of_a_norm_made_again_are_its_own():
    a = A.detach().double().requires_grad_()
    x = F.layer_norm(a * 1, (8,), WEIGHT.double(), SHIFT.double(), 0.1)
    recipe = recipe_of(x, True, Site())
    made = make(recipe.steps, recipe.kept)
    ours, theirs = (torch.autograd.grad(t.square().sum(), a, create_graph=True)[0] for t in (made, x))
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(
        *(torch.autograd.grad(g.square().sum(), a, retain_graph=True)[0] for g in (ours, theirs))
    )


def test_what_checkpointing_or_hooks_keep_elsewhere_is_left_alone():
    found = []

    def part(a: Tensor) -> Tensor:
        found.append(recipe_of(x := F.gelu(a * 1), True, Site()))
        return x

    with set_checkpoint_early_stop(False):
        checkpoint(part, A, use_reentrant=False).sum().backward()
    with torch.autograd.graph.save_on_cpu():
        found.append(recipe_of(F.gelu(A * 1), True, Site()))
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: (t,), lambda t: pytest.fail("unpacked before the backward")
    ):
        found.append(recipe_of(F.gelu(A * 1), True, Site()))
    assert found == [None] * 4


def test_hooks_that_keep_the_tensor_itself_change_nothing():
    norm = nn.LayerNorm(8).requires_grad_(False)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t):
        assert recipe_of(norm(A * 1), True, Site()) is not None


def test_a_weight_that_its_module_has_let_go_of_is_not_read():
    """FSDP frees a norm's gathered weights when the norm has run, before anybody reads what it gave."""
    weight, shift = WEIGHT.clone(), SHIFT.clone()
    x = F.layer_norm(A * 1, (8,), weight, shift)
    assert recipe_of(x, True, Site()) is not None
    weight.untyped_storage().resize_(0)
    assert recipe_of(x, True, Site()) is None


def test_ways_that_differ_in_sizes_alone_are_tried_once(monkeypatch):
    tried: list[object] = []
    monkeypatch.setattr(recipes, "make", lambda *given: tried.append(given) or make(*given))
    site = Site()
    for rows in (1, 2, 3):
        assert recipe_of(F.gelu(A[:, :rows] * 1).reshape(-1, 8), True, site) is not None
    assert len(tried) == 1
