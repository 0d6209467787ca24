"""Schedules beside those of transformers, per group."""

import pytest
import torch
from blends import Net
from transformers import get_scheduler

import deltaspec
from deltaspec.training import scheduler

STEPS = 20


def rates(schedule, optimizer):
    found = []
    for _ in range(STEPS):
        found.append([group["lr"] for group in optimizer.param_groups])
        optimizer.step()
        schedule.step()
    return found


def compiled(*hints):
    deltas = [
        {"name": f"d{n}", "method": "lora", "target": "a", **({"train": train} if train else {})}
        for n, train in enumerate(hints)
    ]
    return deltaspec.compile(Net(), {"deltaspec": 1, "deltas": deltas})


@pytest.mark.parametrize("name", ["linear", "cosine", "inverse_sqrt", "constant"])
@pytest.mark.parametrize("warmup", [0, 4, 0.15])
def test_beside_transformers(name, warmup):
    c = compiled({"lr": 0.5, "schedule": name, "warmup": warmup})
    ours = torch.optim.SGD(c.parameter_groups())
    theirs = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.5)
    steps = 3 if warmup == 0.15 else warmup
    other = get_scheduler("constant_with_warmup" if name == "constant" else name, theirs, steps, STEPS)
    expected = torch.tensor(rates(other, theirs))
    assert torch.allclose(torch.tensor(rates(scheduler(ours, STEPS), ours)), expected)


def test_each_group_by_its_own_hints_and_a_state_that_resumes():
    c = compiled({"lr": 1.0, "schedule": "linear"}, None, {"lr": 2.0, "warmup": 10})
    optimizer = torch.optim.SGD(c.parameter_groups(), lr=3.0)
    schedule = scheduler(optimizer, STEPS)
    whole = rates(schedule, optimizer)
    assert whole[5] == [0.75, 3.0, 1.0] and whole[15] == [0.25, 3.0, 2.0]
    optimizer = torch.optim.SGD(c.parameter_groups(), lr=3.0)
    schedule = scheduler(optimizer, STEPS)
    for _ in range(5):
        optimizer.step()
        schedule.step()
    again = torch.optim.SGD(c.parameter_groups(), lr=3.0)
    resumed = scheduler(again, STEPS)
    resumed.load_state_dict(schedule.state_dict())
    again.load_state_dict(optimizer.state_dict())
    assert [group["lr"] for group in again.param_groups] == whole[5]
    again.step()
    resumed.step()
    assert [group["lr"] for group in again.param_groups] == whole[6]
    with pytest.raises(ValueError, match="steps is 1 or more"):
        scheduler(optimizer, 0)
