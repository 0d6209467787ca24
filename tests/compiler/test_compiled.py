"""A compiled model: copies, pickles, threads, and what of it is trainable."""

import copy
import io
import pickle
import threading

import pytest
import torch
import views
from four_deltas import build, disturb, run, spec
from models import ARCHITECTURES
from one_delta import single
from torch import Tensor, nn

import deltaspec
from deltaspec.backbone.clone import clone
from deltaspec.backbone.reserved import home
from deltaspec.contract.snapshot import differences, snapshot
from deltaspec.contract.trial import floats, same


def test_a_copy_keeps_what_users_put_on_the_compiled_model():
    compiled = deltaspec.compile(nn.Sequential(nn.Linear(4, 4)), single())
    compiled.note = {"run": 3}
    twin = copy.deepcopy(compiled)
    assert twin.note == {"run": 3} and twin.note is not compiled.note


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
    for names in (("low",), ("low", "wide"), ("norms", "bias")):
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


def test_a_view_is_saved_loaded_merged_simplified_and_exported_as_any_model(tmp_path):
    compiled = views.build()
    view = compiled.view()
    view.only("a")
    expected = views.outputs(view)
    view.save(tmp_path / "saved")
    with torch.no_grad():
        for parameter in compiled.deltas["a"].parameters():
            parameter.zero_()
    assert not torch.equal(views.outputs(view), expected)
    compiled.load(tmp_path / "saved")
    assert torch.equal(views.outputs(view), expected)
    assert torch.allclose(views.outputs(view.merge()), expected, atol=1e-5)
    assert torch.equal(views.outputs(view.simplified()), expected)
    exported = view.export((), views.LLAMA.inputs() | {"use_cache": False})
    assert torch.allclose(views.outputs(exported.module(), use_cache=False), expected, atol=1e-5)
    assert compiled.attached == ()


def test_a_copy_of_a_view_is_a_model_of_its_own(tmp_path):
    names = ("n1", "n2")
    source = views.build(*(views.lora(name) for name in names))
    source.save(tmp_path)
    compiled = views.build()
    compiled.library(tmp_path)
    view = compiled.view()
    view.only({"a": 0.5})
    expected = views.outputs(view)
    restored = pickle.loads(pickle.dumps(view))
    twin = copy.deepcopy(view)
    for copied in (restored, twin):
        assert copied.strengths == {"a": 0.5} and torch.equal(views.outputs(copied), expected)
        assert not {p.data_ptr() for p in copied.parameters()} & {p.data_ptr() for p in compiled.parameters()}
        copied.double().float()
        for parameter in copied.deltas["a"].parameters():
            parameter.data.zero_()
        assert torch.equal(views.outputs(view), expected)
    for name in names:
        assert torch.equal(views.outputs(twin.only(name) and twin), views.outputs(source.only(name) and source))


def test_a_view_is_compiled_as_any_model():
    compiled = views.build()
    view = compiled.view()
    view.only("a")
    expected = views.outputs(view)
    torch._dynamo.reset()
    for target in (view, view.backbone):
        fast = torch.compile(target, fullgraph=True, backend="eager")
        assert torch.equal(views.outputs(fast), expected)
    with view.only("b"):
        assert torch.equal(views.outputs(fast), views.outputs(view))


@pytest.mark.parametrize("copied", ["model", "backbone"])
def test_a_model_that_is_prepared_for_rows_is_copied_whole(copied):
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2)).eval()
    lora = {"method": "lora", "params": {"rank": 2}, "target": {"type": "Linear"}}
    both = {"deltaspec": 1, "deltas": [{"name": "a", **lora}, {"name": "b", **lora}]}
    compiled, x = deltaspec.compile(model, both, example_inputs=torch.ones(2, 4)), torch.randn(3, 4)
    disturb(compiled)
    compiled.only("a")
    rows = ["a", None, "b"]
    wanted = compiled(x, deltas=rows)
    compiled.rows(rows)
    if copied == "backbone":
        assert torch.equal(copy.deepcopy(compiled.backbone)(x), compiled(x))
        return
    twin = copy.deepcopy(compiled)
    assert torch.equal(twin(x), compiled(x)) and torch.equal(twin(x, deltas=rows), wanted)
    for each in (twin, compiled):
        each.only("b")
    assert torch.equal(twin(x), compiled(x))
    twin.detach()
    assert torch.equal(twin(x), model(x)) and compiled.attached == ("b",)
