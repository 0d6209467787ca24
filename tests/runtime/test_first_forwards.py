"""The first forward of a model with code of its own is seen, whatever runs it."""

import pytest
import torch
from inside import gate
from models import ARCHITECTURES
from torch import nn
from torch.nn import functional as F
from writers import LORA, Codebook, X, same, state

import deltaspec
from deltaspec.contract.trial import disturb

SPEC = {"deltaspec": 1, "deltas": [LORA]}


def build(**options):
    model = Codebook().train()
    return model, deltaspec.compile(model, SPEC, example_inputs=(X,), capture="modules", **options)


def test_parameters_that_are_not_written_stay_shared():
    model, compiled = build()
    compiled(X)
    assert compiled.backbone.codes.data_ptr() != model.codes.data_ptr()
    assert compiled.backbone.linear.weight.data_ptr() == model.linear.weight.data_ptr()


@pytest.mark.parametrize("run", ["gradients", "functional", "vmap", "checkpoint", "compiled layer", "inference"])
def test_it_is_seen_in_every_kind_of_forward(run):
    model, compiled = build()
    before = state(model)
    if run == "gradients":
        compiled(X).sum().backward()
        assert all(p.grad is not None for p in compiled.trainable_parameters())
    elif run == "functional":
        named = {n: p for n, p in compiled.named_parameters() if p.requires_grad}
        compiled.eval()  # torch itself refuses to write to what a transform captures
        loss = lambda given: torch.func.functional_call(compiled, given, (X,)).sum()  # noqa: E731
        torch.func.grad(loss)(named)
    elif run == "vmap":
        torch.vmap(compiled.eval())(X[None])
    elif run == "checkpoint":
        torch.utils.checkpoint.checkpoint(compiled, X, use_reentrant=False).sum().backward()
    elif run == "compiled layer":
        compiled.backbone.linear.compile(backend="eager")
        compiled(X)
    else:
        with torch.inference_mode():
            compiled(X)
    assert same(state(model), before)


def test_models_of_transformers_are_not_watched():
    model = ARCHITECTURES["llama"].model()
    compiled = deltaspec.compile(model, {"deltaspec": 1, "deltas": [{"name": "one", "method": "lora"}]})
    assert gate(compiled).first is None
    compiled = deltaspec.compile(nn.Sequential(nn.Linear(4, 4)), {"deltaspec": 1, "deltas": [LORA | {"target": "0"}]})
    assert gate(compiled).first is None


class Mode(nn.Module):
    """Calls a layer in evaluation mode, and reads its weight in training mode."""

    def __init__(self) -> None:
        super().__init__()
        self.before, self.layer = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        hidden = self.before(x)
        if self.training:
            return F.linear(hidden, self.layer.weight, self.layer.bias)
        return self.layer(hidden)


class Labels(Mode):
    """Reads the weight of a layer for a loss."""

    def forward(self, x, labels=None):
        hidden = self.before(x)
        if labels is None:
            return self.layer(hidden)
        logits = F.linear(hidden, self.layer.weight, self.layer.bias)
        return F.cross_entropy(logits.flatten(0, 1), labels.flatten())


class Step(Mode):
    """Reads the weight of a layer where there is one position."""

    def forward(self, x):
        hidden = self.before(x)
        return hidden @ self.layer.weight.T + self.layer.bias if x.shape[1] == 1 else self.layer(hidden)


BATCH = torch.linspace(-1, 1, 40).reshape(2, 5, 4)
WAYS = {
    Mode: (True, (BATCH,)),
    Labels: (False, (BATCH, torch.ones(2, 5, dtype=torch.long))),
    Step: (False, (BATCH[:, :1],)),
}


def on_the_layer(method):
    return {"deltaspec": 1, "deltas": [{"name": "one", "method": method, "target": {"path": "layer"}}]}


@pytest.mark.parametrize("kind", WAYS)
def test_a_weight_that_is_read_in_another_way_of_calling_is_seen_in_the_plan(kind):
    torch.manual_seed(0)
    model, (training, args) = kind().eval(), WAYS[kind]
    compiled = deltaspec.compile(model, on_the_layer("lora"), example_inputs=(BATCH,))
    disturb(compiled)
    merged = compiled.merge()
    for mode, given in ((False, (BATCH,)), (training, args)):
        found, bare = compiled.train(mode)(*given), model.train(mode)(*given)
        assert not torch.allclose(found, bare) and torch.allclose(found, merged.train(mode)(*given), atol=1e-5)
    with pytest.raises(deltaspec.DeltaSpecError, match="DS404.*reads this Linear's weights without calling it"):
        deltaspec.compile(model, on_the_layer("adapter"), example_inputs=(BATCH,))


@pytest.mark.parametrize("method", ["lora", "adapter"])
@pytest.mark.parametrize("kind", WAYS)
def test_without_inputs_the_first_forward_of_each_kind_tells(kind, method):
    torch.manual_seed(0)
    model, (training, args) = kind().eval(), WAYS[kind]
    compiled = deltaspec.compile(model, on_the_layer(method))
    disturb(compiled)
    compiled(BATCH)
    for _ in range(2):
        with pytest.raises(deltaspec.DeltaSpecError, match="DS437.*reads the weights of layer"):
            compiled.train(training)(*args)
    assert torch.equal(compiled.eval().detach()(BATCH), model(BATCH))


class Aside(nn.Module):
    """Has a head that is not called, and a pooler whose output is thrown away."""

    def __init__(self) -> None:
        super().__init__()
        self.before, self.head, self.pooler = nn.Linear(4, 4), nn.Linear(4, 2), nn.Linear(4, 4)

    def forward(self, x, with_head=False):
        hidden = self.before(x)
        self.pooler(hidden)
        return self.head(hidden) if with_head else hidden


@pytest.mark.parametrize("method", ["lora", "adapter"])
@pytest.mark.parametrize("target", ["head", "pooler", ["before", "pooler"]])
def test_without_inputs_a_delta_that_is_in_no_graph_is_told(target, method):
    spec = {"deltaspec": 1, "deltas": [{"name": "one", "method": method, "target": {"path": target}}]}
    compiled = deltaspec.compile(Aside(), spec)
    assert "not proven that a forward pass reaches every site" in str(compiled.plan)
    with torch.no_grad():
        compiled(X)
    with pytest.raises(deltaspec.DeltaSpecError, match="DS468.*'one'.*(no site of it|pooler, which is called)"):
        compiled(X)
    if target == "head":
        assert compiled(X, with_head=True).requires_grad
    compiled.deltas["one"].requires_grad_(False)
    compiled(X)


def test_a_layer_that_is_left_out_now_and_then_is_no_error():
    spec = {"deltaspec": 1, "deltas": [{"name": "one", "method": "lora", "target": {"path": ["before", "head"]}}]}
    compiled = deltaspec.compile(Aside(), spec)
    compiled(X).sum().backward()
    compiled(X, with_head=True).sum().backward()
    assert all(parameter.grad is not None for parameter in compiled.trainable_parameters())


class Recurrent(nn.Module):
    """Keeps a state in an attribute, and reads the weight of a layer that it calls in other steps."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.state = nn.Linear(4, 4), None

    def forward(self, x):
        hidden = self.layer(x) if x.shape[1] > 1 else x @ self.layer.weight.T + self.layer.bias + self.state
        self.state = hidden[:, -1:]
        return hidden


def test_a_state_that_a_forward_keeps_is_there_in_the_next():
    torch.manual_seed(0)
    compiled = deltaspec.compile(Recurrent(), on_the_layer("lora"), example_inputs=(BATCH,))
    assert compiled.plan.deltas[0].sites[0].site.host == ""
    disturb(compiled)
    merged = compiled.merge()
    for given in (BATCH, BATCH[:, :1], BATCH[:, 1:2], 2 * BATCH, BATCH[:, :1]):
        assert torch.allclose(compiled(given), merged(given), atol=1e-5)
