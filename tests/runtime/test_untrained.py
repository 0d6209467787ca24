"""A backward never reaches the user's own weights, whatever was done to the compiled model since."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import deltaspec
from deltaspec.compiler.compiled import CompiledModel
from deltaspec.diagnostics.findings import DeltaSpecError

X = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
SPEC: dict[str, Any] = {
    "deltaspec": 1,
    "deltas": [{"name": name, "method": "lora", "params": {"rank": 2}, "target": "0"} for name in "ab"],
}


def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.Identity())


def saved(c: CompiledModel) -> CompiledModel:
    file = io.BytesIO()
    torch.save(c, file)
    file.seek(0)
    found: CompiledModel = torch.load(file, weights_only=False)
    return found


def assigned(c: CompiledModel) -> CompiledModel:
    c = copy.deepcopy(c)
    c.load_state_dict({key: value.clone() for key, value in c.state_dict().items()}, assign=True)
    return c


def unfrozen(c: CompiledModel) -> CompiledModel:
    c = copy.deepcopy(c)
    for name, parameter in c.backbone.named_parameters():
        if "deltaspec" not in name:
            parameter.requires_grad = name == "2.weight"
    return c


WAYS: dict[str, Callable[[CompiledModel], CompiledModel]] = {
    "as it is": lambda c: c,
    "view": lambda c: c.view(),
    "deepcopy": copy.deepcopy,
    "pickle": lambda c: pickle.loads(pickle.dumps(c)),
    "save": saved,
    "cast": lambda c: copy.deepcopy(c).double().float(),
    "load": assigned,
    "simplified": lambda c: c.simplified(),
    "unfrozen by hand": unfrozen,
    "attached between": lambda c: c.attach().detach(),
    "torch.compile": lambda c: torch.compile(c, backend="aot_eager"),  # type: ignore[return-value]
}


@pytest.mark.parametrize("way", WAYS)
def test_refused(way: str) -> None:
    base = model()
    before = {key: value.clone() for key, value in base.state_dict().items()}
    c = deltaspec.compile(base, SPEC, example_inputs=X).detach()
    made = WAYS[way](c)
    with pytest.raises(DeltaSpecError, match="DS416"):
        made(X).sum().backward()
    assert all(parameter.grad is None for parameter in (*made.parameters(), *base.parameters()))
    assert all(torch.equal(value, before[key]) for key, value in base.state_dict().items())
    made = made if isinstance(made, CompiledModel) else c
    made.attach()
    made(X).sum().backward()
    assert all(parameter.grad is not None for parameter in made.trainable_parameters())


def test_others_are_trained() -> None:
    """What has memory of its own, and gradients of inputs, are nobody's weights."""
    base = model()
    c = deltaspec.compile(base, SPEC, example_inputs=X)
    merged = c.merge()
    c.detach()
    for plain in (base, merged, copy.deepcopy(base)):
        plain(X).sum().backward()
        assert all(parameter.grad is not None for parameter in plain.parameters())
    x = X.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(c(x).sum(), x)
    torch.testing.assert_close(gradient, torch.autograd.grad(base(x).sum(), x)[0])
    c.backbone[2] = nn.Linear(4, 2)  # the user's own head, while nothing is attached
    c.backbone[0].requires_grad_(False)
    c(X).sum().backward()
    c.attach("a").detach()
    c(X).sum().backward()
    assert c.backbone[2].weight.grad is not None


def test_train_backbone() -> None:
    """Asked for, the copy has weights of its own from the start, and so do its copies, but for views."""
    base, plain = model(), model()
    before = {key: value.clone() for key, value in base.state_dict().items()}
    c = deltaspec.compile(base, SPEC, example_inputs=X, train_backbone=True).detach()
    own = {parameter.untyped_storage().data_ptr() for parameter in c.parameters()}
    assert own.isdisjoint(parameter.untyped_storage().data_ptr() for parameter in base.parameters())
    for net, parameters in ((c, c.trainable_parameters()), (plain, plain.parameters())):
        optimizer = torch.optim.SGD(parameters, 0.1)
        net(X).square().sum().backward()
        optimizer.step()
    assert torch.equal(c(X), plain(X)) and torch.equal(c.merge()(X), plain(X))
    assert all(torch.equal(value, before[key]) for key, value in base.state_dict().items())
    for made in (copy.deepcopy(c), pickle.loads(pickle.dumps(c)), c.view(), c.simplified()):
        made(X).sum().backward()
        assert torch.equal(made(X), plain(X))


def test_nothing_attached() -> None:
    c = deltaspec.compile(model(), SPEC, example_inputs=X).detach()
    with pytest.raises(DeltaSpecError, match="DS417"):
        c.merge()
    with pytest.raises(DeltaSpecError, match="DS418"):
        c.trainable_parameters()
    assert len(list(c.trainable_parameters("a"))) == 2
    assert torch.equal(c.merge("a")(X), model()(X))
