"""Compiling: what comes out, what it shares with the model, and that the model is never touched."""

from __future__ import annotations

import copy
import inspect
import io
import threading
from typing import Any

import pytest
import torch
from models import ARCHITECTURES, Branching, Traceable
from torch import Tensor, fx, nn

import deltaspec
from deltaspec.backbone.clone import clone
from deltaspec.backbone.inputs import call_arguments
from deltaspec.backbone.reserved import home
from deltaspec.compiler.compiled import CompiledModel
from deltaspec.contract.snapshot import differences, snapshot
from deltaspec.contract.trial import floats, same
from deltaspec.diagnostics.findings import DeltaSpecError

LINEARS = {"gpt2": {"type": "Conv1D"}}


def spec(architecture: str = "traceable-modules") -> dict[str, Any]:
    linear = LINEARS.get(architecture, {"type": "Linear"})
    return {
        "deltaspec": 1,
        "deltas": [
            {"name": "norms", "method": "full", "target": {"type": "LayerNorm", "optional": True}},
            {"name": "low", "method": "lora", "params": {"rank": 2, "dropout": 0.1}, "target": linear},
            {"name": "wide", "method": "adapter", "params": {"width": 3}, "target": linear},
            {"name": "bias", "method": "bitfit", "target": linear, "attached": False},
        ],
    }


def build(architecture: str = "traceable-modules", model: nn.Module | None = None) -> CompiledModel:
    chosen = ARCHITECTURES[architecture]
    compiled = deltaspec.compile(
        model or chosen.model(), spec(architecture), capture=chosen.capture, example_inputs=chosen.inputs()
    )
    disturb(compiled)
    return compiled


@torch.no_grad()
def disturb(compiled: CompiledModel, number: int = 1) -> None:
    generator = torch.Generator().manual_seed(number)
    for delta in compiled.deltas.values():
        for parameter in delta.parameters():
            parameter.add_((torch.randn(parameter.shape, generator=generator) * 0.1).to(parameter))


@torch.no_grad()
def run(model: nn.Module, architecture: str = "traceable-modules") -> list[Tensor]:
    args, kwargs = call_arguments(ARCHITECTURES[architecture].inputs())
    return floats(model(*args, **kwargs))


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


@pytest.mark.parametrize("architecture", ["bert", "t5", "traceable-modules", "branching"])
def test_both_roots_take_the_arguments_of_the_backbone(architecture):
    compiled = build(architecture)
    compiled.graph.lint()
    args, kwargs = call_arguments(ARCHITECTURES[architecture].inputs())
    wanted = list(inspect.signature(type(compiled.backbone).forward).parameters)[1:]
    names = list(inspect.signature(compiled.forward).parameters)
    assert [name for name in names if name != "deltas"] == wanted
    assert "deltas" in names
    with torch.no_grad():
        assert same(floats(compiled(*args, **kwargs)), floats(compiled.backbone(*args, **kwargs)))
        keywords = dict(zip(wanted, args, strict=False)) | kwargs
        assert same(floats(compiled(**keywords)), floats(compiled.backbone(*args, **kwargs)))


def test_forwards_that_cannot_be_mirrored_are_passed_through():
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 4)

        def forward(self, x: Tensor, /, *more: Tensor, scale: Any = torch.tensor(2.0), **rest: float) -> Tensor:  # noqa: B008
            return self.fc(x) * scale + sum(more) + sum(rest.values())

    model = Odd().eval()
    compiled = deltaspec.compile(model, {"deltaspec": 1, "deltas": [{"name": "d", "method": "lora", "target": "fc"}]})
    x = torch.randn(2, 4)
    for args, kwargs in (((x,), {}), ((x, x, x), {}), ((x,), {"scale": 3}), ((x, x), {"scale": x, "bonus": 1.5})):
        assert torch.equal(compiled(*args, **kwargs), model(*args, **kwargs))
    disturb(compiled)
    assert not torch.equal(compiled(x), model(x))


def test_the_symbolic_region_is_the_whole_model():
    compiled = build("traceable-symbolic")
    compiled.only("low", "wide")
    [(place, region)] = compiled.regions.items()
    assert place == ""
    region.graph.lint()
    calls = [str(node.target) for node in region.graph.nodes if node.op == "call_module"]
    assert [name for name in calls if "dropout" not in name] == ["conv", "bn", "up", "norm", "head"]
    assert "gelu" in region.code


@pytest.mark.parametrize("architecture", ["bert", "traceable-symbolic", "branching"])
def test_deep_copies_share_nothing(architecture):
    compiled = build(architecture)
    hits = []
    compiled.register_forward_hook(lambda *_: hits.append(1))
    expected = run(compiled, architecture)
    twin = copy.deepcopy(compiled)
    assert hits == [1] and same(run(twin, architecture), expected) and hits == [1, 1]
    assert twin.attached == compiled.attached and twin.plan is compiled.plan
    addresses = {p.data_ptr() for p in compiled.parameters()}
    assert addresses.isdisjoint(p.data_ptr() for p in twin.parameters())
    disturb(twin, 3)
    assert same(run(compiled, architecture), expected) and not same(run(twin, architecture), expected)
    backbone = copy.deepcopy(compiled.backbone)
    assert same(run(backbone, architecture), expected)
    disturb(compiled, 4)
    assert same(run(backbone, architecture), expected)
    frozen = copy.deepcopy(compiled.detach())
    assert {p.requires_grad for p in frozen.parameters()} == {True}


def test_saving_the_whole_module_keeps_all_of_it():
    for architecture in ("traceable-symbolic", "branching"):
        compiled = build(architecture)
        compiled.only("low")
        stream = io.BytesIO()
        torch.save(compiled, stream)
        stream.seek(0)
        back = torch.load(stream, weights_only=False)
        assert back.capture == compiled.capture and back.attached == ("low",)
        for names in (("low",), (), ("wide", "bias")):
            assert same(run(back.attach(*names) if names else back.detach(), architecture),
                        run(compiled.attach(*names) if names else compiled.detach(), architecture))  # fmt: skip


@pytest.mark.parametrize("architecture", ["traceable-symbolic", "traceable-modules"])
def test_what_was_compiled_in_inference_mode_trains_outside_of_it(architecture):
    chosen = ARCHITECTURES[architecture]
    model = chosen.model()
    with torch.inference_mode():
        compiled = deltaspec.compile(model, spec(architecture), capture=chosen.capture)
        compiled(chosen.inputs())
    disturb(compiled)
    compiled(chosen.inputs()).sum().backward()
    assert all(parameter.grad is not None for parameter in compiled.trainable_parameters())


def test_an_unknown_attribute_is_an_attribute_error():
    compiled = build()
    with pytest.raises(AttributeError, match="nonsense"):
        _ = compiled.nonsense
    assert not hasattr(compiled, "nonsense")
    assert compiled.head is compiled.backbone.head
    with pytest.raises(TypeError):
        compiled.deltas["new"] = nn.Module()


def test_only_the_parameters_of_attached_deltas_are_trainable():
    compiled = build()
    for names in (("low",), ("low", "wide"), ("norms", "bias"), ()):
        compiled.only(*names)
        found = {id(p) for p in compiled.trainable_parameters()}
        assert found == {id(p) for name in names for p in compiled.deltas[name].parameters()}


def test_several_threads_may_call_one_model():
    compiled = build("branching").eval()
    inputs = ARCHITECTURES["branching"].inputs()
    expected = run(compiled, "branching")
    results: list[list[Tensor]] = []

    def work() -> None:
        with torch.no_grad():
            results.extend(floats(compiled(inputs)) for _ in range(5))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 20 and all(same(result, expected) for result in results)


def test_a_fresh_clone_and_a_detached_backbone_look_the_same():
    for architecture in ARCHITECTURES:
        model = ARCHITECTURES[architecture].model()
        compiled = build(architecture, model).detach()
        fresh = snapshot(clone(model))
        assert differences(fresh, snapshot(compiled.backbone, skip=home(compiled.backbone))) == []
