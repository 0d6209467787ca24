"""A low-rank site where nothing is recorded: plain torch's numbers, and the host's own bits while it is fresh."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from deltaspec.graphs import low_rank
from deltaspec.graphs.inference import without_gradients


def values(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def linear(bias: bool = True) -> nn.Linear:
    host = nn.Linear(6, 5, bias=bias)
    host.load_state_dict({"weight": values(5, 6, seed=1), **({"bias": values(5, seed=2)} if bias else {})})
    return host


DOWN, UP = values(3, 6, seed=3), values(5, 3, seed=4)
SHAPES = [(1, 6), (7, 6), (1, 1, 6), (1, 9, 6), (4, 1, 6), (2, 3, 6), (2, 2, 40, 6)]


@torch.no_grad()
@pytest.mark.parametrize("merges", [False, True], ids=["apart", "merged"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("bias", [False, True], ids=["no bias", "bias"])
def test_it_is_plain_torch_and_changes_no_bit_while_fresh(shape, bias, merges, monkeypatch):
    monkeypatch.setattr(low_rank, "PAYS", 0 if merges else 1 << 40)
    host, x = linear(bias), values(*shape)
    y = without_gradients(host._parameters, x, DOWN, UP, 1.5, False)
    torch.testing.assert_close(y, host(x) + 1.5 * F.linear(F.linear(x, DOWN), UP))
    assert torch.equal(without_gradients(host._parameters, x, DOWN, torch.zeros_like(UP), 1.5, False), host(x))


@torch.no_grad()
def test_a_transposed_weight_is_merged(monkeypatch):
    monkeypatch.setattr(low_rank, "PAYS", 0)
    host, x = {"weight": values(6, 5, seed=1), "bias": values(5, seed=2)}, values(2, 3, 6)
    y = without_gradients(host, x, DOWN, UP, 1.5, True)
    torch.testing.assert_close(y, x @ host["weight"] + host["bias"] + 1.5 * F.linear(F.linear(x, DOWN), UP))


class Marked(Tensor):
    pass


@torch.no_grad()
@pytest.mark.parametrize(
    "changed",
    [
        {"x": values(6)},
        {"x": values(0, 6)},
        {"x": values(6, 4).t()},
        {"x": values(2, 6).as_subclass(Marked)},
        {"x": values(2, 6, dtype=torch.float64)},
        {"host": {}},
        {"host": {"weight": values(5, 6).as_subclass(Marked)}},
        {"host": {"weight": values(5, 6), "bias": values(5, dtype=torch.float64)}},
        {"down": values(3, 6, dtype=torch.float64)},
    ],
    ids=["vector", "nothing", "strided", "subclass", "wider", "no weight", "packed", "wide bias", "wide delta"],
)
def test_what_has_rules_of_its_own_is_left_to_the_host(changed: dict[str, Any]):
    given = {"host": linear()._parameters, "x": values(2, 6), "down": DOWN, "up": UP, "scale": 1.5, "transposed": False}
    assert without_gradients(**given) is not None
    assert without_gradients(**(given | changed)) is None


@torch.no_grad()
def test_it_stands_aside_under_autocast_and_transforms():
    host, x = linear(), values(2, 6)
    seen = []

    def run(x: Tensor) -> Tensor:
        seen.append(without_gradients(host._parameters, x, DOWN, UP, 1.5, False))
        return x

    with torch.autocast("cpu", torch.bfloat16):
        run(x)
    torch.func.vmap(run)(x[None])
    assert seen == [None, None]
