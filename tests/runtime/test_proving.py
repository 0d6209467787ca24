"""Deltas that a forward would go around are found: in the plan, at the first forward, or before a trace."""

import pytest
import torch
from models import ARCHITECTURES
from readers import INPUTS, Reader, build
from torch import nn
from torch.nn import functional as F

import deltaspec
from deltaspec.compiler.compiled import CompiledModel
from deltaspec.diagnostics.findings import DeltaSpecError

X = torch.linspace(-1, 1, 8).reshape(2, 4)


class ReadsWeight(nn.Module):
    """Reads the weight of `read` and calls `called`; does not trace, for its forward has an optional argument."""

    def __init__(self):
        super().__init__()
        self.read, self.called = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x, scale=None):
        return F.linear(x, self.read.weight, self.read.bias) + self.called(x)


class CallsAndReads(nn.Module):
    def __init__(self):
        super().__init__()
        self.both = nn.Linear(4, 4)

    def forward(self, x, scale=None):
        return self.both(x) + x @ self.both.weight


def spec(method, *targets, **params):
    deltas = [{"name": f"d{i}", "method": method, "target": t, "params": params} for i, t in enumerate(targets)]
    return {"deltaspec": 1, "deltas": deltas}


def perturb(compiled):
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for delta in compiled.deltas.values():
            for parameter in delta.parameters():
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))


@pytest.mark.parametrize("method", ["lora", "bitfit", "full", "adapter"])
def test_the_first_forward_refuses_a_delta_that_it_goes_around(method):
    model = ReadsWeight()
    with pytest.raises(DeltaSpecError, match=r"DS437.* reads the weights of read without calling it"):
        deltaspec.compile(model, spec(method, "read"))(X)


def test_every_delta_is_proven_by_its_own_first_forward():
    document = spec("lora", "called", "read")
    document["deltas"][1]["attached"] = False
    compiled = deltaspec.compile(ReadsWeight(), document)
    compiled(X)
    assert "forward" not in compiled.backbone.__dict__  # the watch is over
    compiled.only("d1")
    with pytest.raises(DeltaSpecError, match="DS437"):
        compiled(X)


def test_a_trace_needs_a_proof_first():
    compiled = deltaspec.compile(ReadsWeight(), spec("lora", "called"))
    with pytest.raises(DeltaSpecError, match="DS440"):
        compiled.export((X,))
    with pytest.raises(Exception, match="DS440"):
        torch.compile(compiled, fullgraph=True, backend="eager")(X)
    compiled(X)
    perturb(compiled)
    torch.testing.assert_close(torch.compile(compiled, fullgraph=True, backend="eager")(X), compiled(X))


@pytest.mark.parametrize("method", ["lora", "full"])
@pytest.mark.parametrize("model", [ReadsWeight, CallsAndReads])
def test_with_example_inputs_the_delta_goes_onto_the_weight(method, model):
    target = "read" if model is ReadsWeight else "both"
    compiled = deltaspec.compile(model(), spec(method, target), example_inputs=X)
    perturb(compiled)
    assert not torch.equal(compiled(X), compiled.detach()(X))
    torch.testing.assert_close(compiled.attach()(X), compiled.merge()(X))


def test_a_method_around_the_call_does_not_mind_a_weight_that_is_also_read():
    compiled = deltaspec.compile(CallsAndReads(), spec("adapter", "both"), example_inputs=X)
    perturb(compiled)
    assert list(compiled.regions) == ["both"]
    assert not torch.equal(compiled(X), compiled.detach()(X))


def test_the_fast_path_without_example_inputs():
    model = nn.TransformerEncoderLayer(4, 2, 8, batch_first=True).eval()
    compiled = deltaspec.compile(model, spec("lora", "linear1"))
    perturb(compiled)
    with torch.no_grad():
        changed = compiled(X[None])
        torch.testing.assert_close(changed, compiled.merge()(X[None]))
        assert torch.equal(compiled.detach()(X[None]), model(X[None]))


@pytest.mark.parametrize("inputs", [None, X])
def test_a_weight_that_a_hook_computes(inputs):
    with pytest.warns(FutureWarning):
        model = nn.Sequential(nn.utils.weight_norm(nn.Linear(4, 4)))
    with pytest.raises(DeltaSpecError, match="DS402.* a hook computes weight"):
        deltaspec.compile(model, spec("full", {"parameter": "0.weight_v"}), example_inputs=inputs)


@pytest.mark.parametrize("inputs", [None, X])
def test_a_weight_that_a_parametrisation_computes(inputs):
    model = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)))
    compiled = deltaspec.compile(model, spec("full", "0"), example_inputs=inputs)
    before = compiled(X)
    with torch.no_grad():
        compiled.deltas["d0"].tensor("0.parametrizations.weight.original1").mul_(2).add_(0.3)
    assert not torch.equal(compiled(X), before)
    assert torch.equal(compiled.detach()(X), model(X))
    around = deltaspec.compile(model, spec("lora", "0"), example_inputs=inputs)
    with pytest.raises(DeltaSpecError, match="DS435.* is computed, not a parameter"):
        around.merge()


def test_without_inputs_the_first_forward_tells_of_a_bypass():
    spec = {"deltaspec": 1, "deltas": [{"name": "d", "method": "adapter", "target": "read"}]}
    made = deltaspec.compile(build(Reader), spec)
    assert "not proven" in str(made.plan)
    with pytest.raises(DeltaSpecError, match="DS437.*'d' is bypassed: the model reads the weights of read"):
        made(INPUTS)
    assert torch.equal(made.detach()(INPUTS), build(Reader)(INPUTS))


@pytest.mark.parametrize("capture", ["symbolic", "modules"])
def test_without_inputs_a_weight_that_is_called_and_read_is_told_too(capture):
    def made(method: str) -> CompiledModel:
        spec = {"deltaspec": 1, "deltas": [{"name": "d", "method": method, "target": "both"}]}
        return deltaspec.compile(build(Reader), spec, capture=capture)

    with pytest.raises(DeltaSpecError, match="DS437.*reads the weights of both besides calling it"):
        made("lora")(INPUTS)
    assert made("adapter")(INPUTS).shape == (2, 5, 16)  # which works around the call, and leaves the weight alone


def test_without_inputs_a_good_first_forward_passes_and_leaves_no_hooks():
    model = ARCHITECTURES["branching"].model()
    spec = {"deltaspec": 1, "deltas": [{"name": "d", "method": "lora", "target": ["head", "block.up"]}]}
    made = deltaspec.compile(model, spec)
    made(ARCHITECTURES["branching"].inputs())
    hooks = [m for m in made.modules() if m._forward_hooks or m._forward_pre_hooks]
    assert hooks == []
    assert "forward" not in made.backbone.__dict__
