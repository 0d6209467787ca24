"""Parts of formulas that are computed again: gradients of every method as without, and less that is kept."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from training import assert_same_gradients, gradients, kept_bytes, serve_small, spread

import deltaspec
from deltaspec.methods.registry import methods

IDS = torch.arange(12).view(2, 6)
LIGHTER = {"adapter", "loha", "lokr", "low_rank_adapter", "parallel_adapter", "reft", "vera"}
"""Some methods that keep less in float32, too, besides lora."""


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(30, 16)
        self.norm = nn.LayerNorm(16)
        self.up, self.down, self.head = nn.Linear(16, 32), nn.Linear(32, 16, bias=False), nn.Linear(16, 5)

    def forward(self, ids: Tensor) -> Tensor:
        h = self.embed(ids)
        h = h + self.down(F.gelu(self.up(self.norm(h))))
        return self.head(self.norm(h))


@pytest.fixture(autouse=True)
def _small(monkeypatch):
    serve_small(monkeypatch)


def both(method: str, dtype: torch.dtype = torch.float32, **params: object) -> list[nn.Module]:
    found = []
    target = {"path": ["up", "down", "head"]}
    spec = {"deltaspec": 1, "deltas": [{"name": "a", "method": method, "params": params, "target": target}]}
    for passes in (True, False):
        torch.manual_seed(0)
        net = Net().to(dtype)
        model = deltaspec.compile(net, spec, example_inputs=IDS, passes=passes, capture="modules").train()
        spread(model)
        found.append(model)
    return found


CASES = [(name, dropped) for name, method in sorted(methods().items()) for dropped in (False, True)
         if not dropped or method.training & {"dropout"} & set(method.Params.model_fields)]  # fmt: skip


@pytest.mark.parametrize(("method", "dropped"), CASES)
def test_gradients_are_those_without_passes(method, dropped):
    known = methods()[method]
    more = {"token_ids": [1, 2]} if method == "trainable_tokens" else {"dropout": 0.3} if dropped else {}
    try:
        ours, plain = both(method, **{**known.small, **more})
    except deltaspec.DeltaSpecError as error:  # it takes no linear layers
        assert {finding.code for finding in error.diagnostics} <= {"DS402", "DS403", "DS210"}
        return
    assert_same_gradients(gradients(ours, IDS), gradients(plain, IDS))
    if method in LIGHTER:
        assert kept_bytes(ours, IDS) < kept_bytes(plain, IDS)


@pytest.mark.parametrize("params", [{}, {"dropout": 0.3}, {"bias": True}, {"init": "olora"}, {"use_dora": True}])
def test_a_wider_delta_on_a_narrow_backbone(params):
    ours, plain = both("lora", torch.bfloat16, rank=2, **params)
    assert_same_gradients(gradients(ours, IDS), gradients(plain, IDS), 0.05)
    if "use_dora" not in params:
        assert kept_bytes(ours, IDS) < kept_bytes(plain, IDS)


def test_what_runs_without_gradients_is_the_graph_itself():
    ours, plain = both("loha", rank=2)
    with torch.no_grad():
        assert torch.equal(ours(IDS), plain(IDS))
    assert all("part_" not in region.code for region in ours.regions.values())


def test_gradients_of_gradients():
    found = []
    for model in both("parallel_adapter", torch.float64, width=4):
        parameters = [p for p in model.parameters() if p.requires_grad]
        first = torch.autograd.grad(model(IDS).square().sum(), parameters, create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in first), parameters)
        found.append({str(number): g for number, g in enumerate((*first, *second))})
    assert_same_gradients(*found, tolerance=1e-9)


def test_unknown_functions_stay_as_they_are():
    loha = both("loha", rank=2, module_dropout=0.5)[0]  # draws by itself
    torch.manual_seed(1)
    assert gradients(loha, IDS).keys() > {""}
