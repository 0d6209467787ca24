"""The states of optimizers, beside those that torch's own make in a first step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, get_args

import pytest
import torch
from measured_step import size
from torch import Tensor, nn

from deltaspec.costs.optimizers import Trained, state_bytes
from deltaspec.language.conditions import Optimizer

REAL: dict[Optimizer, Callable[[Any], torch.optim.Optimizer]] = {
    "adadelta": torch.optim.Adadelta,
    "adafactor": torch.optim.Adafactor,
    "adagrad": torch.optim.Adagrad,
    "adam": torch.optim.Adam,
    "adamax": torch.optim.Adamax,
    "adamw": torch.optim.AdamW,
    "muon": lambda parameters: torch.optim.Muon([p for p in parameters if p.dim() == 2]),
    "nadam": torch.optim.NAdam,
    "radam": torch.optim.RAdam,
    "rmsprop": torch.optim.RMSprop,
    "sgd": torch.optim.SGD,
    "sgd_momentum": lambda parameters: torch.optim.SGD(parameters, momentum=0.9),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", REAL)
def test_states_of_torch(name: Optimizer, dtype: torch.dtype) -> None:
    shapes = [(8, 3), (5, 8), (7, 4)] if name == "muon" else [(8, 3), (5,), (2, 3, 4), (1,)]
    parameters = [nn.Parameter(torch.ones(shape, dtype=dtype)) for shape in shapes]
    optimizer = REAL[name](parameters)
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    states = [value for state in optimizer.state.values() for value in state.values() if isinstance(value, Tensor)]
    assert state_bytes(name, [Trained(tuple(p.shape), p.element_size()) for p in parameters]) == size(states)


def test_states_of_eight_bits() -> None:
    large, small = Trained((64, 128), 4), Trained((64, 8), 4)
    # bitsandbytes: two bytes a value and a float32 a block of 256 for each; below 4,096 values two float32.
    assert state_bytes("adamw_8bit", [large]) == 2 * (8192 + 4 * 32)
    assert state_bytes("adamw_8bit", [small]) == 2 * 4 * 512
    assert state_bytes("lion_8bit", [large, small]) == 8192 + 4 * 32 + 4 * 512


def test_every_optimizer_is_known() -> None:
    assert all(state_bytes(name, [Trained((4, 4), 4)]) >= 0 for name in get_args(Optimizer))
