"""Compiling: what comes out, what it shares with the model, and that the model is never touched."""

from __future__ import annotations

import threading

import pytest
import torch
from four_deltas import build, disturb, run, spec
from models import ARCHITECTURES, Branching, Traceable
from one_delta import single
from torch import fx, nn

import deltaspec
from deltaspec.backbone.inputs import call_arguments
from deltaspec.backbone.reserved import home
from deltaspec.compiler.compiled import CompiledModel
from deltaspec.contract.snapshot import differences, snapshot
from deltaspec.contract.trial import floats, same
from deltaspec.diagnostics.findings import DeltaSpecError


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_model_is_never_touched(architecture, training):
    chosen = ARCHITECTURES[architecture]
    model = chosen.model().train(training)
    for index, parameter in enumerate(model.parameters()):
        parameter.requires_grad = index % 3 > 0
    next(model.children()).register_forward_hook(lambda m, i, o: None)
    before = snapshot(model, identity=True)
    state = torch.random.get_rng_state()
    compiled = build(architecture, model)
    assert torch.equal(state, torch.random.get_rng_state())
    assert compiled.training is training and compiled.backbone.training is training
    compiled.train()
    args, kwargs = call_arguments(chosen.inputs())
    for active in (("norms", "low"), ("wide", "bias"), ()):
        compiled.only(*active)
        output = floats(compiled(*args, **kwargs))[0]
        if active:
            output.pow(2).sum().backward()
            torch.optim.Adam(compiled.trainable_parameters()).step()
    compiled.attach()
    compiled.double()
    compiled.requires_grad_(False)
    assert differences(before, snapshot(model, identity=True)) == []


@pytest.mark.parametrize("architecture", ["bert", "traceable-symbolic", "traceable-modules"])
def test_the_result_shares_weights_and_copies_buffers(architecture):
    model = ARCHITECTURES[architecture].model()
    compiled = build(architecture, model)
    assert isinstance(compiled, CompiledModel) and isinstance(compiled, fx.GraphModule)
    assert type(compiled.backbone) is type(model)
    deltas = home(compiled.backbone)
    mine = {n: p for n, p in compiled.backbone.named_parameters() if not n.startswith(deltas + ".")}
    theirs = dict(model.named_parameters())
    assert mine.keys() == theirs.keys()
    for name, parameter in theirs.items():
        assert mine[name] is not parameter and mine[name].data_ptr() == parameter.data_ptr()
    for name, buffer in model.named_buffers():
        assert compiled.backbone.get_buffer(name).data_ptr() != buffer.data_ptr() or not buffer.numel()
    assert compiled.plan.trainable == sum(p.numel() for d in compiled.deltas.values() for p in d.parameters())
    modules = [name for name, _ in compiled.backbone.named_modules() if name.partition(deltas)[1] == ""]
    assert modules == [name for name, _ in model.named_modules()]


def test_training_the_model_further_is_seen_by_the_compiled_one():
    model = Traceable().eval()
    compiled = build("traceable-modules", model)
    before = run(compiled)
    with torch.no_grad():
        model.head.weight.mul_(2)
    assert not same(run(compiled), before)
    assert same(run(compiled.detach()), run(model))


@pytest.mark.parametrize("architecture", ["bert", "traceable-symbolic"])
def test_two_compiled_models_over_one_do_not_see_each_other(architecture):
    model = ARCHITECTURES[architecture].model()
    plain = run(model, architecture)
    one, two = build(architecture, model), build(architecture, model)
    disturb(two, 5)
    first, second = run(one, architecture), run(two, architecture)
    assert not same(first, second)
    one.detach()
    assert same(run(two, architecture), second) and same(run(one, architecture), plain)
    one.only("bias")
    two.detach()
    assert not same(run(one, architecture), plain) and same(run(two, architecture), plain)
    assert same(run(model, architecture), plain)


def test_several_specs_share_one_backbone():
    one = {"deltaspec": 1, "deltas": [{"name": "a", "method": "lora", "target": "up", "params": {"rank": 2}}]}
    two = {"deltaspec": 1, "deltas": [{"name": "b", "method": "bitfit", "target": "up"}]}
    compiled = deltaspec.compile(Traceable().eval(), one, two)
    assert compiled.attached == ("a", "b") and list(compiled.deltas) == ["a", "b"]
    both = deltaspec.compile(Traceable().eval(), {"deltaspec": 1, "deltas": [*one["deltas"], *two["deltas"]]})
    assert compiled.state_dict().keys() == both.state_dict().keys()
    with pytest.raises(DeltaSpecError, match=r"DS407.*'a' is taken"):
        deltaspec.compile(Traceable().eval(), one, one)


def test_a_spec_is_a_dict_a_path_or_a_deltaspec(tmp_path):
    path = tmp_path / "x.deltaspec.yaml"
    path.write_text("deltaspec: 1\ndeltas:\n  - {name: a, method: bitfit, target: up}\n")
    data = {"deltaspec": 1, "deltas": [{"name": "a", "method": "bitfit", "target": "up"}]}
    made = [deltaspec.compile(Traceable(), spec) for spec in (path, str(path), data, deltaspec.load(data))]
    assert {tuple(m.state_dict()) for m in made} == {tuple(made[0].state_dict())}


def test_what_cannot_be_compiled():
    compiled = build()
    for model in (compiled, compiled.backbone):
        with pytest.raises(DeltaSpecError, match="DS431.*compiled already"):
            deltaspec.compile(model, spec())
    with pytest.raises(DeltaSpecError, match="DS432.*Branching cannot be captured as symbolic: it does not trace"):
        deltaspec.compile(Branching(), spec(), capture="symbolic")
    with pytest.raises(ValueError, match="capture is 'auto', 'modules' or 'symbolic', not 'fx'"):
        deltaspec.compile(Traceable(), spec(), capture="fx")
    with pytest.raises(TypeError, match="torch.nn.Module, not"):
        deltaspec.compile("bert", spec())

    class Locked(Traceable):
        def __init__(self) -> None:
            super().__init__()
            self.lock = threading.Lock()

    with pytest.raises(DeltaSpecError, match="DS430.*Locked cannot be copied"):
        deltaspec.compile(Locked(), spec())


def test_an_embedding_that_renormalises_itself_does_not_reach_the_original():
    model = nn.Sequential(nn.Embedding(10, 4, max_norm=1.0))
    before = model[0].weight.detach().clone()
    deltaspec.compile(model, single(target="0"))(torch.arange(10)[None])
    assert torch.equal(before, model[0].weight)


def test_a_layer_of_width_zero():
    model = nn.Sequential(nn.Linear(3, 0), nn.Linear(0, 2))
    x = torch.ones(2, 3)
    assert torch.equal(deltaspec.compile(model, single())(x), model(x))


def test_what_cannot_be_compiled_says_so():
    with torch.inference_mode():
        model = nn.Linear(4, 4)
    with pytest.raises(DeltaSpecError, match="DS430.*inference_mode"):
        deltaspec.compile(nn.Sequential(model), single())
    with pytest.raises(TypeError, match=r"must be a torch.nn.Module, not NoneType"):
        deltaspec.compile(None, single())
    with pytest.raises(TypeError, match="a spec is a path, a dict or a DeltaSpec, not int"):
        deltaspec.compile(nn.Linear(4, 4), 5)
    compiled = deltaspec.compile(nn.Sequential(nn.Linear(4, 4)), single())
    with pytest.raises(DeltaSpecError, match="DS431"):
        deltaspec.compile(compiled, single())
    with pytest.raises(TypeError, match="one by one"):
        compiled.attach(["d"])
