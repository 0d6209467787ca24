"""Roles are vouched for where a model runs what transformers wrote, and only there."""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
from models import ARCHITECTURES
from torch import Tensor, nn
from torch.nn import functional as F

import deltaspec
from deltaspec.contract.trial import disturb


def reading(self: Any, x: Tensor) -> Tensor:
    return self.down_proj(F.linear(x, self.up_proj.weight) * self.act_fn(self.gate_proj(x)))


class Reading(nn.Module):
    def __init__(self, mlp: Any) -> None:
        super().__init__()
        self.up_proj, self.gate_proj, self.down_proj, self.act_fn = (
            mlp.up_proj,
            mlp.gate_proj,
            mlp.down_proj,
            mlp.act_fn,
        )

    forward = reading


def by_class(layer: Any, patch: pytest.MonkeyPatch) -> None:
    layer.mlp = Reading(layer.mlp)


def by_instance(layer: Any, patch: pytest.MonkeyPatch) -> None:
    layer.mlp.forward = types.MethodType(reading, layer.mlp)


def by_patch(layer: Any, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(type(layer.mlp), "forward", reading)


@pytest.mark.parametrize("put", [by_class, by_instance, by_patch])
def test_a_forward_from_elsewhere_is_observed(put: Callable[..., None], monkeypatch: pytest.MonkeyPatch):
    model, ids = ARCHITECTURES["llama"].model().eval(), ARCHITECTURES["llama"].inputs()
    put(model.model.layers[0], monkeypatch)
    spec = {"deltaspec": 1, "deltas": [{"name": "one", "method": "lora", "target": {"path": "**.0.mlp.up_proj"}}]}
    bare = model(**ids).logits
    if put is by_instance:
        with pytest.raises(deltaspec.DeltaSpecError, match=r"DS412.*runs model\.layers\.0\.mlp"):
            deltaspec.compile(model, spec)
        return
    compiled = deltaspec.compile(model, spec)
    assert compiled.plan.deltas[0].sites[0].site.host == "model.layers.0.mlp"
    disturb(compiled)
    assert not torch.equal(compiled(**ids).logits, bare) and torch.equal(compiled.detach()(**ids).logits, bare)


def test_a_linear_with_a_forward_that_was_put_onto_it():
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.plain, self.twice = nn.Linear(4, 4), nn.Linear(4, 4)
            plain, twice = self.plain, self.twice
            plain.forward = lambda x: x @ plain.weight.T + plain.bias
            twice.forward = lambda x: 2 * F.linear(x, twice.weight, twice.bias)

        def forward(self, x: Tensor) -> Tensor:
            return self.twice(self.plain(x))

    torch.manual_seed(0)
    model, x = Net(), torch.randn(3, 4)
    lora = {"name": "one", "method": "lora", "target": {"path": "plain"}}
    compiled = deltaspec.compile(model, {"deltaspec": 1, "deltas": [lora]}, example_inputs=(x,))
    disturb(compiled)
    assert torch.allclose(compiled.merge()(x), compiled(x), atol=1e-5) and not torch.equal(compiled(x), model(x))
    with pytest.raises(deltaspec.DeltaSpecError, match=r"DS412.*twice"):
        deltaspec.compile(model, {"deltaspec": 1, "deltas": [lora | {"target": {"path": "twice"}}]})
