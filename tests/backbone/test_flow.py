"""What becomes of what leaves a module: nothing is used of some, and some run without gradients."""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
from readers import INPUTS
from torch import Tensor, nn

import deltaspec
from deltaspec.backbone.observe import observe
from deltaspec.diagnostics.findings import DeltaSpecError


class Idle(nn.Module):
    """Calls a block and does not use what it gives, beside layers whose outputs are used in ways of their own."""

    def __init__(self, use: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.used, self.other = nn.Linear(16, 16), nn.Linear(16, 16)
        self.pooler = nn.Sequential(nn.Linear(16, 16), nn.Tanh())
        self.kept: list[Tensor] = []
        self.use = use

    def forward(self, x: Tensor) -> Any:
        self.pooler(x)
        found = self.use(self.other(x))
        if found is None:
            self.kept = [self.other(x)]
        return self.used(x) if found is None else (self.used(x), found)


USES: dict[str, Callable[[Tensor], Any]] = {
    "computed": lambda y: y * 2,
    "in place": lambda y: y.relu_().mul_(2) + 1,
    "written to a view": lambda y: torch.zeros(2, 2, 5, 16)[0].copy_(y),
    "detached": lambda y: y.detach() + 1,
    "an index": lambda y: y.argmax(-1),
    "a condition": lambda y: torch.ones(1) if (y.sum() > 0) else torch.zeros(1),
    "an object": lambda y: types.SimpleNamespace(inside=[y]),
    "kept": lambda y: None,
}


@pytest.mark.parametrize("use", USES.values(), ids=USES)
def test_a_module_whose_output_nothing_uses_is_refused_and_no_other(use):
    model = Idle(use).eval()

    def plan(target: str) -> Any:
        delta = {"name": "d", "method": "lora", "target": target}
        return deltaspec.plan(model, {"deltaspec": 1, "deltas": [delta]}, example_inputs=INPUTS)

    assert plan("used").trainable and plan("other").trainable
    with pytest.raises(DeltaSpecError, match="DS403.*nothing that the model gives is computed from what leaves this"):
        plan("pooler.0")
    seen, _ = observe(model, INPUTS)
    assert {fqn for fqn, found in seen.items() if found.fate == "idle"} == {"pooler", "pooler.0", "pooler.1"}


@pytest.mark.parametrize("method", ["lora", "full"])
def test_a_weight_in_a_forward_without_gradients_is_refused_and_an_adapter_is_not(method):
    class Table(nn.Embedding):
        """As the sinusoidal positions of Marian and Pegasus."""

        @torch.no_grad()
        def forward(self, input: Tensor) -> Tensor:
            return super().forward(input)

    model = nn.Sequential(Table(20, 16), nn.Linear(16, 16)).eval()
    inputs = torch.arange(6).reshape(2, 3)

    def plan(method: str) -> Any:
        delta = {"name": "d", "method": method, "target": "0"}
        return deltaspec.plan(model, {"deltaspec": 1, "deltas": [delta]}, example_inputs=inputs)

    with pytest.raises(DeltaSpecError, match="this Table runs without gradients, so a delta of its weights"):
        plan(method)
    assert plan("adapter").trainable
