"""Views: the same weights and deltas, an active set each; threads that each have one get what they get alone."""

from __future__ import annotations

import gc
import weakref
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from models import ARCHITECTURES, Architecture, Counting
from torch import Tensor, nn
from views import LLAMA, alone, build, code, lora, outputs, serve

from deltaspec.compiler.compiled import CompiledModel
from deltaspec.diagnostics.findings import DeltaSpecError

KINDS = ("llama", "bert", "t5", "traceable-symbolic", "branching")


def two(architecture: Architecture) -> CompiledModel:
    """Two deltas where an architecture takes them."""
    target = "head" if architecture.targets[-1] in ("head", {"type": "Embedding"}) else {"type": "Linear"}
    deltas = [lora(name, target=target) for name in ("a", "b")]
    inputs = architecture.inputs()
    return build(*deltas, model=architecture.model(), capture=architecture.capture, example_inputs=inputs)


def storages(compiled: nn.Module) -> dict[int, int]:
    tensors = [*compiled.parameters(), *compiled.buffers()]
    return {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_each_view_has_an_active_set_of_its_own(kind):
    architecture = ARCHITECTURES[kind]
    compiled = two(architecture)
    sets: list[dict[str, float]] = [{}, {"a": 1.0}, {"b": 1.0}, {"a": 1.0, "b": 1.0}, {"a": 0.5}]
    expected = []
    for names in sets:
        with compiled.only(names):
            expected.append(outputs(compiled, architecture))
    for start, names in enumerate(sets):
        compiled.only(names)
        view = compiled.view()
        assert isinstance(view, CompiledModel) and type(view.backbone) is type(compiled.backbone)
        assert view.strengths == compiled.strengths == names and view.capture == compiled.capture
        assert torch.equal(outputs(view, architecture), expected[start])
        for other, wanted in zip(sets, expected, strict=True):
            view.only(other)
            assert torch.equal(outputs(view, architecture), wanted)
            assert torch.equal(outputs(compiled, architecture), expected[start])
        compiled.detach()
        assert torch.equal(outputs(view, architecture), expected[-1])


def test_a_view_takes_no_memory_for_weights_and_has_the_same_deltas():
    compiled = build()
    before = storages(compiled)
    view = compiled.only("a") and compiled.view()
    more = {place: size for place, size in storages(view).items() if place not in before}
    assert sum(more.values()) == sum(b.nbytes for b in view.buffers()) < 1024
    assert compiled.state_dict().keys() == view.state_dict().keys()
    for name in compiled.deltas:
        for ours, theirs in zip(compiled.deltas[name].parameters(), view.deltas[name].parameters(), strict=True):
            assert ours is theirs
    for (name, ours), (_, theirs) in zip(
        compiled.backbone.named_parameters(), view.backbone.named_parameters(), strict=True
    ):
        assert ours.data_ptr() == theirs.data_ptr() and (ours is theirs) == ("deltaspec" in name)
    held = {id(p) for each in (compiled, view) for p in each.deltas["a"].parameters()}
    assert len(held) == len(list(compiled.deltas["a"].parameters()))  # an optimizer over both holds each once


def test_a_view_outlives_what_it_was_made_of():
    compiled = build()
    compiled.only("a")
    expected = outputs(compiled)
    view, gone = compiled.view(), weakref.ref(compiled)
    del compiled
    gc.collect()
    assert gone() is None and torch.equal(outputs(view), expected)
    assert torch.equal(outputs(view.view()), expected)


def test_flags_of_the_backbone_are_each_views_own():
    model = LLAMA.model()
    model.lm_head.weight.requires_grad = False
    compiled = build(model=model)
    compiled.only("a")
    view = compiled.view()

    def flags(of: CompiledModel) -> set[bool]:
        own = {n: p.requires_grad for n, p in of.backbone.named_parameters() if "deltaspec" not in n}
        assert not own["lm_head.weight"]
        return {flag for name, flag in own.items() if name != "lm_head.weight"}

    assert flags(view) == flags(compiled) == {False}
    view.detach()
    assert flags(view) == {True} and flags(compiled) == {False}
    compiled.detach()
    view.attach("b")
    assert flags(view) == {False} and flags(compiled) == {True}


def test_modes_dropout_and_buffers_are_each_views_own():
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 4)).eval()
    deltas = [{"name": "a", "method": "lora", "params": {"dropout": 0.5}, "target": "3"}]
    compiled = build(*deltas, model=model, example_inputs=torch.ones(2, 4))
    view = compiled.view()
    x = torch.randn(8, 4)
    expected = compiled(x)
    view.train()
    assert not compiled.training and not compiled.deltas["a"].training and view.deltas["a"].training
    assert torch.equal(compiled(x), expected) and not torch.equal(view(x), view(x))
    view.detach()(x)  # detached and in training mode, BatchNorm moves its statistics
    assert not torch.equal(view.backbone[1].running_mean, compiled.backbone[1].running_mean)
    assert torch.equal(compiled(x), expected)


@pytest.mark.parametrize("attached", [(), ("a",)])
def test_a_view_made_in_between_goes_back_to_the_buffers_that_the_backbone_had(attached):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), Counting(), nn.Linear(4, 4))
    compiled = build({"name": "a", "method": "lora", "target": "0"}, model=model, example_inputs=torch.ones(2, 4))
    compiled.detach()(torch.ones(2, 4))
    compiled.only(*attached)
    for _ in range(3):
        compiled(torch.ones(2, 4))
    view = compiled.view()
    assert float(view.detach().backbone[1].count) == float(compiled.detach().backbone[1].count)
    assert torch.equal(view.backbone[1].last, compiled.backbone[1].last)


def test_hooks_of_others_go_along_bound_to_the_view():
    model = LLAMA.model()
    module = model.model.layers[0].self_attn.q_proj
    own, calls = module.forward, []

    def counted(x: Tensor) -> Tensor:
        calls.append(x)
        return own(x)

    module.forward = counted
    compiled = build(model=model)
    for names in ((), ("a",)):
        view = compiled.only(*names) and compiled.view()
        calls.clear()
        assert torch.equal(outputs(view), outputs(compiled)) and len(calls) == 2
        kept = view.detach().backbone.model.layers[0].self_attn.q_proj
        assert kept.__dict__["forward"].__closure__[1].cell_contents.__self__ is kept  # and `calls` is the user's list


# Training


def gradients(compiled: CompiledModel, name: str) -> list[Tensor]:
    compiled.only(name)
    return list(torch.autograd.grad(outputs(compiled).square().mean(), [*compiled.deltas[name].parameters()]))


def test_views_train_different_deltas_in_turns_as_each_trains_alone():
    compiled = build()
    expected = {name: gradients(compiled, name) for name in ("a", "b")}
    views = {name: compiled.view() for name in expected}
    for name, view in views.items():
        view.only(name)
    losses = {name: outputs(view).square().mean() for name, view in views.items()}
    for loss in losses.values():
        loss.backward()
    for name, wanted in expected.items():
        found = [p.grad for p in compiled.deltas[name].parameters()]
        assert all(torch.equal(one, other) for one, other in zip(found, wanted, strict=True))
    assert all(p.grad is None for name in ("c", "d", "e") for p in compiled.deltas[name].parameters())
    assert all(
        p.grad is None for view in views.values() for n, p in view.backbone.named_parameters() if "spec" not in n
    )


def test_threads_train_different_deltas_at_once_as_each_trains_alone():
    torch.set_num_threads(1)

    def train(view: CompiledModel, name: str) -> list[Tensor]:
        view.only(name)
        optimizer = torch.optim.AdamW(view.trainable_parameters(), lr=0.01)
        for _ in range(10):
            outputs(view).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        return [p.detach().clone() for p in view.deltas[name].parameters()]

    names = ("a", "b", "d")
    alone = {name: train(build(), name) for name in names}
    compiled = build()
    with ThreadPoolExecutor(len(names)) as pool:
        together = list(pool.map(train, [compiled.view() for _ in names], names))
    for name, found in zip(names, together, strict=True):
        assert all(torch.equal(one, other) for one, other in zip(found, alone[name], strict=True))
        assert all(torch.equal(p, w) for p, w in zip(compiled.deltas[name].parameters(), found, strict=True))


@pytest.mark.usefixtures("restless")
def test_threads_on_views_of_their_own_get_what_they_get_alone():
    names = ("a", "b", "c", "d", "e")
    expected = alone(build(), names)
    compiled = build()
    views = [compiled, *(compiled.view() for _ in range(3))]
    with ThreadPoolExecutor(len(views)) as pool:
        found = list(pool.map(lambda i: serve(views[i], i, names, expected, 50), range(len(views))))
    assert found == [0] * len(views)


def test_rows_made_for_one_view_serve_another():
    compiled = build()
    first, second = compiled.view(), compiled.view()
    second.rows(["d", "e"])  # kinds are first met in another order
    rows = first.rows(["a", "d"])
    assert torch.equal(outputs(second, deltas=rows), outputs(first, deltas=["a", "d"]))


# Whole models


def test_moving_one_of_several_views_is_refused():
    compiled = build()
    compiled.only("a")
    expected = outputs(compiled)
    view = compiled.view()
    before = {n: (t.dtype, t.data_ptr()) for n, t in view.state_dict().items()}
    for act in (view.half, view.backbone.half, lambda: view.to("meta")):
        with pytest.raises(DeltaSpecError) as error:
            act()
        assert code(error) == "DS455" and "before the views are made" in str(error.value)
        assert {n: (t.dtype, t.data_ptr()) for n, t in view.state_dict().items()} == before
    view.to("cpu").float()  # changes nothing
    assert torch.equal(outputs(view), expected) and torch.equal(outputs(compiled), expected)
    del act, error, compiled
    view.double()
    assert outputs(view).dtype == torch.float64
    assert torch.equal(outputs(view.view()), outputs(view))


def test_parameters_that_a_load_replaces_are_replaced_for_all_views():
    compiled, other = build(), build()
    compiled.only("a")
    view = compiled.view()
    state = {n: t + 0.1 if "deltaspec" in n else t.clone() for n, t in other.state_dict().items()}
    view.load_state_dict(state, assign=True)
    other.load_state_dict(state)
    other.only("a")
    assert view.deltas["a"].tensor(key := next(iter(dict(view.deltas["a"].tensors())))) is compiled.deltas["a"].tensor(
        key
    )
    for each in (view, compiled):
        assert torch.equal(outputs(each), outputs(other))


def test_derived_deltas_are_computed_for_all_views_and_only_written_when_they_change():
    derived = {"name": "mix", "combine": "linear", "from": {"a": 0.5, "b": 0.5}, "attached": False}
    compiled = build(lora("a"), lora("b"), lora("c"), derived)
    compiled.only("mix", "c")
    expected = outputs(compiled)
    view = compiled.view()
    loss = outputs(compiled).square().mean()
    view.detach()
    view.attach("mix", "c")  # nothing changed, nothing is written: the other view's backward goes on
    loss.backward()
    assert torch.equal(outputs(view), expected)


def test_making_a_view_computes_nothing(tmp_path: Path):
    derived = {"name": "mix", "combine": "linear", "from": {"a": 0.5, "b": 0.5}, "attached": False}
    compiled = build(lora("a"), lora("b"), derived)
    compiled.only("mix")
    expected = outputs(compiled)
    with torch.no_grad():
        for parameter in compiled.deltas["a"].parameters():
            parameter.add_(1.0)
    assert torch.equal(outputs(compiled.view()), expected)
