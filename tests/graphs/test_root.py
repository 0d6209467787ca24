"""The root graph takes the arguments of the backbone's forward."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from four_deltas import build, disturb
from models import ARCHITECTURES
from torch import Tensor, nn

import deltaspec
from deltaspec.backbone.inputs import call_arguments
from deltaspec.contract.trial import floats, same


@pytest.mark.parametrize("architecture", ["bert", "t5", "traceable-modules", "branching"])
def test_both_roots_take_the_arguments_of_the_backbone(architecture):
    compiled = build(architecture)
    compiled.graph.lint()
    args, kwargs = call_arguments(ARCHITECTURES[architecture].inputs())
    wanted = list(inspect.signature(type(compiled.backbone).forward).parameters)[1:]
    names = list(inspect.signature(compiled.forward).parameters)
    assert [name for name in names if name != "deltas"] == wanted
    assert "deltas" in names
    with torch.no_grad():
        assert same(floats(compiled(*args, **kwargs)), floats(compiled.backbone(*args, **kwargs)))
        keywords = dict(zip(wanted, args, strict=False)) | kwargs
        assert same(floats(compiled(**keywords)), floats(compiled.backbone(*args, **kwargs)))


def test_forwards_that_cannot_be_mirrored_are_passed_through():
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 4)

        def forward(self, x: Tensor, /, *more: Tensor, scale: Any = torch.tensor(2.0), **rest: float) -> Tensor:  # noqa: B008
            return self.fc(x) * scale + sum(more) + sum(rest.values())

    model = Odd().eval()
    compiled = deltaspec.compile(model, {"deltaspec": 1, "deltas": [{"name": "d", "method": "lora", "target": "fc"}]})
    x = torch.randn(2, 4)
    for args, kwargs in (((x,), {}), ((x, x, x), {}), ((x,), {"scale": 3}), ((x, x), {"scale": x, "bonus": 1.5})):
        assert torch.equal(compiled(*args, **kwargs), model(*args, **kwargs))
    disturb(compiled)
    assert not torch.equal(compiled(x), model(x))
