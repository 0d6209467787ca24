"""Deltas that act nowhere require no gradients, for whoever looks; and no gradient is lost by that."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import nn

import deltaspec
from deltaspec.compiler.compiled import CompiledModel

X = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))


def build() -> CompiledModel:
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    deltas = [{"name": name, "method": "lora", "target": "0"} for name in "ab"]
    return deltaspec.compile(base, {"deltaspec": 1, "deltas": deltas}, example_inputs=X)


def trained(c: CompiledModel) -> set[str]:
    """Return the deltas that a training script would find."""
    return {name.split(".")[-2] for name, p in c.named_parameters() if p.requires_grad and "deltaspec" in name}


def learns(c: CompiledModel, name: str) -> bool:
    return all(parameter.grad is not None for parameter in c.deltas[name].parameters())


def test_flags_follow_what_is_attached() -> None:
    c = build()
    assert trained(c) == {"a", "b"}
    for name, other in ("ab", "ba", "ab"):
        c.only(name)
        assert trained(c) == {name} and not any(p.requires_grad for p in c.deltas[other].parameters())
        c.zero_grad()
        c(X).sum().backward()
        assert learns(c, name) and not learns(c, other)
    assert trained(c.detach()) == set()
    assert len(list(c.trainable_parameters("a", "b"))) == 4
    view = c.view().attach("b")
    assert trained(c) == trained(view) == {"b"}


def test_no_gradient_is_lost() -> None:
    """A backward through what ran before a switch, after someone looked."""
    c = build()
    with c.only("a"):
        loss = c(X).square().sum()
    c.only("b")
    assert trained(c) == {"b"}
    loss.backward()
    assert learns(c, "a") and trained(c) == {"b"}


def test_rows_train_what_is_idle() -> None:
    c = build().detach()
    assert trained(c) == set()
    c(X, deltas=["a", None, "b"]).sum().backward()
    assert learns(c, "a") and learns(c, "b")
    rows = c.rows(["a", None, "b"])
    assert trained(c) == {"a", "b"}  # for as long as the model is prepared for rows
    c.zero_grad()
    c(X, deltas=rows).sum().backward()
    assert learns(c, "a") and learns(c, "b")


WAYS: dict[str, Callable[[CompiledModel], CompiledModel]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda c: pickle.loads(pickle.dumps(c)),
    "view": lambda c: c.view(),
    "simplified": lambda c: c.simplified(),
    "cast": lambda c: c.double().float(),
}


@pytest.mark.parametrize("way", WAYS)
def test_copies_wake(way: str) -> None:
    c = build()
    c.only("a")
    assert trained(c) == {"a"}
    made = WAYS[way](c)
    made.only("b")
    made(X).sum().backward()
    assert learns(made, "b")


def test_flags_of_users_stay() -> None:
    c = build()
    frozen = next(c.deltas["a"].parameters())
    frozen.requires_grad_(False)
    c.only("b")
    assert trained(c) == {"b"}
    c.only("a")
    assert not frozen.requires_grad and trained(c) == {"a"}
    c.deltas["b"].requires_grad_(False)
    c.only("b")
    assert trained(c) == set()
    c.deltas["b"].requires_grad_()
    c.only("a")
    c.requires_grad_(False)
    c.attach("b")
    assert trained(c) == set()
