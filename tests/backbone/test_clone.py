"""The structural copy: everything is there, weights are shared, ties are kept, the source is untouched."""

from __future__ import annotations

import copy
import threading

import pytest
import torch
from models import ARCHITECTURES
from torch import fx, nn
from torch.nn.utils import parametrizations, parametrize

import deltaspec
from deltaspec.backbone.clone import clone
from deltaspec.backbone.inputs import call_arguments
from deltaspec.contract.snapshot import differences, snapshot
from deltaspec.contract.trial import disturb, floats, same
from deltaspec.diagnostics.findings import DeltaSpecError


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_copy_equals_its_source_and_shares_its_weights(architecture, training):
    chosen = ARCHITECTURES[architecture]
    model = chosen.model().train(training)
    before = snapshot(model, identity=True)
    twin = clone(model)
    assert differences(snapshot(model), snapshot(twin)) == []
    args, kwargs = call_arguments(chosen.inputs())
    with torch.no_grad():
        assert same(floats(twin.eval()(*args, **kwargs)), floats(clone(model).eval()(*args, **kwargs)))
    assert differences(before, snapshot(model, identity=True)) == []
    pairs = list(zip(model.named_parameters(), twin.named_parameters(), strict=True))
    assert all(a is not b and a.data_ptr() == b.data_ptr() for (_, a), (_, b) in pairs)
    assert {id(m) for m in model.modules()}.isdisjoint(id(m) for m in twin.modules())
    for name, buffer in model.named_buffers():
        assert not buffer.numel() or twin.get_buffer(name).data_ptr() != buffer.data_ptr()


@pytest.mark.parametrize("architecture", ["gpt2", "t5", "bart"])
def test_ties_are_kept(architecture):
    model = ARCHITECTURES[architecture].model()
    twin = clone(model)

    def ties(which: nn.Module) -> list[list[str]]:
        places: dict[int, list[str]] = {}
        for name, parameter in which.named_parameters(remove_duplicate=False):
            places.setdefault(id(parameter), []).append(name)
        return sorted(names for names in places.values() if len(names) > 1)

    assert ties(twin) == ties(model) != []


def test_flags_gradients_and_classes_of_parameters():
    class Marked(nn.Parameter):
        pass

    model = nn.Linear(3, 3)
    model.weight = Marked(torch.ones(3, 3), requires_grad=False)
    model.weight.note = "kept"
    model(torch.ones(1, 3)).sum().backward()
    twin = clone(model)
    assert type(twin.weight) is Marked and twin.weight.note == "kept" and not twin.weight.requires_grad
    assert twin.bias.grad is None and twin.bias.requires_grad and model.bias.grad is not None


def test_a_module_in_two_places_stays_one():
    shared = nn.Linear(3, 3)
    twin = clone(nn.ModuleDict({"a": shared, "b": shared, "c": nn.Sequential(shared)}))
    assert twin["a"] is twin["b"] is twin["c"][0]


@pytest.mark.parametrize(("nested", "capture"), [(False, "symbolic"), (False, "modules"), (True, "modules")])
def test_a_graph_module_keeps_its_hooks_attributes_and_deltas(nested, capture):
    torch.manual_seed(0)
    inner = fx.symbolic_trace(nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4)))
    inner.note = {"kept": [1]}
    inner.register_forward_hook(lambda module, args, output: output * 2)
    model = nn.Sequential(nn.Linear(4, 4), inner) if nested else inner
    x = torch.randn(3, 4)
    delta = {"name": "one", "method": "lora", "params": {"rank": 2}, "target": {"type": "Linear"}}
    compiled = deltaspec.compile(model, {"deltaspec": 1, "deltas": [delta]}, capture=capture)
    disturb(compiled)
    attached, twin = compiled(x), copy.deepcopy(compiled)
    assert not torch.equal(attached, model(x))
    assert torch.equal(twin(x), attached)
    assert torch.allclose(compiled.merge("one")(x), attached, atol=1e-5)
    disturb(twin)
    assert torch.equal(compiled(x), attached)
    for each in (compiled, twin):
        each.detach()
        assert torch.equal(each(x), model(x))
    copied = twin.backbone[1] if nested else twin.backbone
    assert copied.note == inner.note and copied.note is not inner.note and copied.graph is not inner.graph


def test_meta_copies_have_no_storage():
    model = ARCHITECTURES["bert"].model()
    twin = clone(model, device="meta")
    assert {t.device.type for t in (*twin.parameters(), *twin.buffers())} == {"meta"}
    assert [(n, p.shape, p.dtype) for n, p in twin.named_parameters()] == [
        (n, p.shape, p.dtype) for n, p in model.named_parameters()
    ]
    assert {p.device.type for p in model.parameters()} == {"cpu"}


@pytest.mark.parametrize(
    "make",
    [
        lambda: parametrizations.weight_norm(nn.Linear(4, 4)),
        lambda: parametrizations.spectral_norm(nn.Linear(4, 4)),
        lambda: parametrizations.orthogonal(nn.Linear(4, 4)),
        lambda: torch.nn.utils.weight_norm(nn.Linear(4, 4)),
        lambda: torch.nn.utils.spectral_norm(nn.Linear(4, 4)),
    ],
    ids=["weight_norm", "spectral_norm", "orthogonal", "old weight_norm", "old spectral_norm"],
)
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_computed_weights(make):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(make()).eval()
    x = torch.randn(2, 4)
    model(x)
    before = snapshot(model, identity=True)
    twin = clone(model)
    assert torch.equal(twin(x), model(x))
    twin.train()(x).sum().backward()
    after = {k: v for k, v in snapshot(model, identity=True).items() if k != "0:weight"}
    # The old-style norms compute `weight` in a hook of every forward: that is theirs, not ours.
    assert differences({k: v for k, v in before.items() if k != "0:weight"}, after) == []
    if parametrize.is_parametrized(model[0]):
        assert parametrize.is_parametrized(twin[0])


def test_an_embedding_that_writes_to_its_weight_does_not_reach_the_source():
    model = nn.Sequential(nn.Embedding(5, 4, max_norm=0.1)).eval()
    before = snapshot(model, identity=True)  # with the count of writes, which backward asks about
    clone(model)(torch.arange(5))
    assert differences(before, snapshot(model, identity=True)) == []


def test_what_cannot_be_copied_is_named():
    model = nn.Sequential(nn.Linear(2, 2))
    model.lock = threading.Lock()
    with pytest.raises(DeltaSpecError, match="DS430.*Sequential cannot be copied.*lock"):
        clone(model)
    with torch.inference_mode():
        frozen = nn.Linear(2, 2)
    with pytest.raises(DeltaSpecError, match="DS430.*inference_mode"):
        clone(frozen)
