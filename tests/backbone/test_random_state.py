"""The random state of every device stays what it was, whatever is run to look at a model."""

from __future__ import annotations

from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

import deltaspec
from deltaspec.backbone.random_state import random_state_kept, seeded_on_cpu


def test_the_devices_of_tensors_are_forked(monkeypatch: pytest.MonkeyPatch) -> None:
    with FakeTensorMode():
        tensors = [torch.empty(1, device=device) for device in ("cpu", "cuda:1", "cuda:0", "meta")]
    forked: list[tuple[str, list[int]]] = []

    @contextmanager
    def fork(devices: list[int], device_type: str = "cuda") -> Any:
        forked.append((device_type, devices))
        yield

    monkeypatch.setattr(torch.random, "fork_rng", fork)
    with random_state_kept(tensors):
        assert forked == [("cuda", []), ("cuda", [0, 1])]
    with random_state_kept():
        assert forked[2:] == [("cuda", [])]


def test_a_seed_is_the_cpus_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    seeded: list[int] = []
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeded.append)
    state = torch.get_rng_state()
    with seeded_on_cpu(5):
        drawn = torch.rand(3)
    assert torch.equal(state, torch.get_rng_state())
    assert torch.equal(drawn, torch.rand(3, generator=torch.Generator().manual_seed(5))) and not seeded


class Own(nn.Linear):
    """A class of somebody else's, whose forward is tried on random numbers."""

    def forward(self, input: Tensor) -> Tensor:
        return input @ self.weight.T + self.bias


def test_compiling_seeds_no_device(monkeypatch: pytest.MonkeyPatch) -> None:
    seeded: list[int] = []
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeded.append)
    spec = {"deltaspec": 1, "deltas": [{"name": "d", "method": "lora", "target": "0"}]}
    deltaspec.compile(nn.Sequential(Own(4, 4)), spec, example_inputs=torch.ones(1, 4))
    assert not seeded
