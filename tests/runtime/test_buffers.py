"""Whatever a forward writes while deltas are attached, and however, is gone once they are detached."""

from __future__ import annotations

import copy
import gc
from typing import Any

import pytest
import torch
from torch import nn
from writers import LORA, WRITERS, X, same, state

import deltaspec


@pytest.mark.parametrize("kind", WRITERS)
@pytest.mark.parametrize("proven", [True, False])
def test_what_was_written_detached_stays_and_what_was_written_attached_goes(kind: type[nn.Module], proven: bool):
    torch.manual_seed(0)
    model: Any = kind()
    plain, before = copy.deepcopy(model), state(model)
    inputs = {"example_inputs": (X,)} if proven else {}
    compiled = deltaspec.compile(model, {"deltaspec": 1, "deltas": [LORA]}, capture="modules", **inputs)
    for parameter in compiled.trainable_parameters():
        nn.init.normal_(parameter)
    compiled.detach()
    for trained in (compiled.train(), plain.train()):
        for _ in range(3):
            trained(X)
    expected = state(plain)
    assert same(state(compiled.backbone), expected) and same(state(model), before)
    for step in ("view", "forward", "view", "cast", "detach", "cast"):
        if step == "view":
            compiled.attach()
            assert same(state(compiled.view().detach().backbone), expected)
            gc.collect()
        elif step == "forward":
            compiled(X)
            compiled(2 * X)
        elif step == "cast":
            compiled.double().float()
        else:
            compiled.detach()
            assert same(state(compiled.backbone), expected)
    assert torch.equal(compiled.eval()(X), plain.eval()(X)) and same(state(model), before)


def test_a_norm_with_a_forward_of_its_own_runs_that():
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    model[1].forward = lambda x: x * 2
    compiled = deltaspec.compile(model.eval(), {"deltaspec": 1, "deltas": [LORA | {"target": {"path": "0"}}]})
    assert torch.equal(compiled(X), model(X))
    with pytest.raises(deltaspec.DeltaSpecError, match=r"DS414.* 1 is in training mode"):
        compiled.train()(X)


def test_buffers_come_back_from_the_meta_device():  # where accelerate has a model while FSDP makes shards of it
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    model[1].register_buffer("steps", torch.arange(3.0), persistent=False)
    compiled = deltaspec.compile(model.eval(), {"deltaspec": 1, "deltas": [LORA | {"target": {"path": "0"}}]})
    expected, saved, kept = state(compiled.backbone), compiled.state_dict(), compiled.backbone[1].steps
    compiled.to("meta")
    compiled.load_state_dict(saved, assign=True)
    compiled.backbone[1].register_buffer("steps", kept, persistent=False)
    compiled.load_state_dict(saved, assign=True)
    assert torch.equal(compiled(X), model(X))
    compiled.detach()
    assert same(state(compiled.backbone), expected)
