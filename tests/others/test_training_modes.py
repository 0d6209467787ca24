"""Passes over training steps in every way to run and differentiate a model: gradients are those without passes."""

from __future__ import annotations

import functools
import io
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts
from training import assert_same_gradients, loss_of, serve_small, spread

import deltaspec

IDS = torch.arange(16).view(2, 8)
METHODS = {
    "lora": ("lora", {"rank": 2}),
    "lora with dropout": ("lora", {"rank": 2, "dropout": 0.3}),
    "adapter": ("adapter", {"width": 4}),
}
Model = Callable[..., Tensor]


class Net(nn.Module):
    """Norms, a gated feed-forward with a dropout, a residual, and an activation by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm, self.last = nn.Embedding(30, 16), nn.LayerNorm(16), nn.LayerNorm(16)
        self.gate, self.up, self.down = nn.Linear(16, 32), nn.Linear(16, 32, bias=False), nn.Linear(32, 16)
        self.act, self.drop, self.gelu, self.head = nn.SiLU(), nn.Dropout(0.25), nn.GELU(), nn.Linear(16, 8)

    def forward(self, ids: Tensor) -> Tensor:
        h = self.embed(ids)
        for _ in range(2):
            normed = self.norm(h)
            h = h + self.drop(self.down(self.act(self.gate(normed)) * self.up(normed)))
        found: Tensor = self.head(self.gelu(self.last(h)))
        return found


def compiled(method: str, passes: bool) -> deltaspec.CompiledModel:
    torch.manual_seed(0)
    name, params = METHODS[method]
    delta = {"name": "a", "method": name, "params": params, "target": {"path": ["gate", "up", "down", "head"]}}
    spec = {"deltaspec": 1, "deltas": [delta]}
    model = deltaspec.compile(Net(), spec, example_inputs=IDS, passes=passes, capture="modules").train()
    spread(model)
    return model


@pytest.fixture(autouse=True)
def _small(monkeypatch):
    serve_small(monkeypatch)


def assert_alike(method: str, run: Callable[[deltaspec.CompiledModel], Tensor | None], tolerance: float = 2e-5) -> None:
    found = []
    for passes in (True, False):
        model = compiled(method, passes)
        loss_of(model, IDS)  # the first forward finds out what activations are for
        torch.manual_seed(0)
        loss = run(model)
        if loss is not None:
            loss.backward()
        found.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert found[0]
    assert_same_gradients(*found, tolerance=tolerance)


def several(model: Model) -> Tensor:
    return loss_of(model, IDS) + 2 * loss_of(model, IDS.flip(0)) + loss_of(model, IDS[:1])


def twice(model: Model) -> None:
    loss = loss_of(model, IDS)
    loss.backward(retain_graph=True)
    loss.backward()


def some_first(model: deltaspec.CompiledModel) -> None:
    """Differentiate by some, and by all: what several sites share is then not used by all of them."""
    loss = loss_of(model, IDS)
    parameters = [p for p in model.parameters() if p.requires_grad]
    torch.autograd.grad(loss, parameters[:1], retain_graph=True)
    loss.backward()


def batched(model: deltaspec.CompiledModel) -> None:
    y = model(IDS)
    parameters = [p for p in model.parameters() if p.requires_grad]
    arriving = torch.stack([torch.ones_like(y), torch.linspace(-1, 1, y.numel()).view(y.shape)])
    for parameter, both in zip(
        parameters, torch.autograd.grad(y, parameters, arriving, is_grads_batched=True), strict=True
    ):
        parameter.grad = both[0] + 3 * both[1]


def in_mutable(model: Model) -> None:
    with torch.autograd.graph.allow_mutation_on_saved_tensors():
        loss_of(model, IDS).backward()


def unhooked(model: Model) -> Tensor:
    with torch.autograd.graph.disable_saved_tensors_hooks("there are none"):
        return loss_of(model, IDS)


def anomalies(model: Model) -> None:
    with torch.autograd.detect_anomaly(check_nan=True):
        loss_of(model, IDS).backward()


def selective(model: Model) -> Tensor:
    def keep(context: object, operator: object, *given: object, **more: object) -> CheckpointPolicy:
        return CheckpointPolicy.MUST_SAVE if "mm" in str(operator) else CheckpointPolicy.PREFER_RECOMPUTE

    contexts = functools.partial(create_selective_checkpoint_contexts, keep)
    y = checkpoint(model, IDS, use_reentrant=False, context_fn=contexts)
    return loss_of(lambda _: y, IDS)


def traced(model: deltaspec.CompiledModel) -> Tensor:
    script = torch.jit.trace(model.eval(), IDS, check_trace=False)
    torch.jit.save(script, io.BytesIO())
    return loss_of(script, IDS)


def functional(model: deltaspec.CompiledModel) -> None:
    values = {name: p.detach() for name, p in model.eval().named_parameters() if p.requires_grad}

    def loss(given: dict[str, Tensor]) -> Tensor:
        return loss_of(lambda ids: torch.func.functional_call(model, given, (ids,)), IDS)

    for name, gradient in torch.func.grad(loss)(values).items():
        model.get_parameter(name).grad = gradient


WAYS = [several, twice, some_first, batched, in_mutable, unhooked, anomalies, selective, functional]


@pytest.mark.filterwarnings("ignore:Anomaly Detection")
@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
@pytest.mark.parametrize("method", METHODS)
def test_gradients_are_those_without_passes(method, way):
    assert_alike(method, way)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("method", METHODS)
def test_what_is_traced_can_be_saved_and_trained(method):
    assert_alike(method, traced)


@pytest.mark.parametrize("method", METHODS)
def test_the_backward_may_run_under_autocast(method):
    def run(model: Model) -> None:
        with torch.autocast("cpu", torch.bfloat16):
            loss_of(model, IDS).backward()

    assert_alike(method, run, 0.1)


@pytest.mark.parametrize("method", METHODS)
def test_at_which_size_passes_begin_to_pay_is_no_condition_of_a_compiled_graph(method, monkeypatch):
    for place in ("passes.recompute", "passes.recompute_parts", "dropouts", "activations"):
        monkeypatch.setattr(f"deltaspec.graphs.{place}.FEW", 100)
    name, params = METHODS[method]
    spec = {"deltaspec": 1, "deltas": [{"name": "a", "method": name, "params": params, "target": {"path": "0"}}]}
    net = nn.Sequential(nn.Linear(4, 4), nn.SiLU(), nn.Dropout(0.5))
    model = deltaspec.compile(net, spec, example_inputs=torch.ones(2, 4)).train()
    graphs: list[object] = []
    torch._dynamo.reset()
    fast = torch.compile(model, fullgraph=True, dynamic=True, backend=lambda graph, _: graphs.append(graph) or graph)
    for rows in (3, 300):
        x = torch.linspace(-1, 1, 4 * rows).view(rows, 4).requires_grad_()
        assert torch.autograd.grad(fast(x).sum(), x)[0].abs().sum() > 0
    assert len(graphs) == 1


@pytest.mark.parametrize("method", METHODS)
def test_parameters_that_change_before_the_backward_are_found_out(method):
    loss = loss_of(model := compiled(method, True), IDS)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
