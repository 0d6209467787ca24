"""What a trace would fix of a model keeps it from being captured as symbolic, or is watched."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import deltaspec
from deltaspec.contract.trial import disturb

X = torch.linspace(-1, 1, 12).reshape(3, 4)
SPEC = {"deltaspec": 1, "deltas": [{"name": "one", "method": "lora", "target": {"path": "inner.linear"}}]}


class Inner(nn.Module):
    gain = 1.0

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.bias = nn.Linear(4, 4), nn.Parameter(torch.ones(4))

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) * self.gain + self.bias


class Plain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.layers = Inner(), nn.ModuleList([nn.Linear(4, 4), nn.ReLU()])

    def forward(self, x: Tensor) -> Tensor:
        x = self.inner.linear(x) + self.inner.bias
        for layer in self.layers:
            x = layer(x)
        return x


class Scaled(Plain):
    def __init__(self) -> None:
        super().__init__()
        self.scale, self.weights, self.act, self.mode = 2, [1.0, 0.5], F.relu, {"kind": "twice"}

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.inner(x) * self.scale) * sum(self.weights)
        return x * 2 if self.mode["kind"] == "twice" else x


CHANGES: dict[str, tuple[str, Any]] = {
    "scale": ("", 3), "weights": ("", [3.0]), "act": ("", torch.tanh), "mode": ("", {"kind": "once"}),
    "gain": ("inner", 0.5),
}  # fmt: skip


@pytest.mark.parametrize("name", CHANGES)
def test_an_attribute_that_is_changed_later_counts(name: str):
    torch.manual_seed(0)
    model, (fqn, value) = Scaled(), CHANGES[name]
    automatic = disturbed(deltaspec.compile(model, SPEC))
    assert automatic.capture == "modules" and "scale" in automatic.capture_reason
    traced = disturbed(deltaspec.compile(model, SPEC, capture="symbolic"))
    assert "asked for; the trace fixes" in traced.capture_reason and f"{fqn}.{name}".strip(".") in traced.capture_reason
    made = [traced, traced.view(), copy.deepcopy(traced), pickle.loads(pickle.dumps(traced))]
    assert all(torch.allclose(each(X), automatic(X)) for each in made)
    for each in (automatic, *made):
        module = each.backbone.get_submodule(fqn)
        if name == "weights":  # in place, as much as by assignment
            module.weights[:] = value
        else:
            setattr(module, name, value)
    setattr(model.get_submodule(fqn), name, value)
    assert torch.equal(automatic.detach()(X), model(X))
    for each in made:
        with pytest.raises(deltaspec.DeltaSpecError, match=rf"DS469.*{name} was"):
            each(X)
        assert torch.equal(each.detach()(X), model(X))


def disturbed(compiled: Any) -> Any:
    disturb(compiled)
    return compiled


def test_a_model_that_reads_modules_and_tensors_alone_is_traced():
    compiled = deltaspec.compile(Plain(), SPEC)
    assert compiled.capture == "symbolic" and "fixes" not in compiled.capture_reason


def test_a_forward_that_was_put_onto_the_model_is_not_traced():
    model = Plain()
    model.forward = lambda x: model.inner.linear(x) * 2
    compiled = deltaspec.compile(model, SPEC)
    assert compiled.capture == "modules" and "a forward was put onto it" in compiled.capture_reason
    assert torch.equal(compiled.detach()(X), model(X))
