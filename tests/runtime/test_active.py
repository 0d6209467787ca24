"""Random walks over attaching, detaching, training, files and copies; the bits must be what the active set says."""

from __future__ import annotations

import copy
import tempfile
from typing import Any

import pytest
import torch
from five_deltas import NAMES, TARGETS, build, move, outputs, planned, spec
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from models import ARCHITECTURES

import deltaspec
from deltaspec.backbone.clone import clone
from deltaspec.backbone.inputs import call_arguments
from deltaspec.backbone.reserved import RESERVED
from deltaspec.compiler.compiled import CompiledModel
from deltaspec.contract.snapshot import differences, snapshot
from deltaspec.contract.trial import floats, same, seed
from deltaspec.diagnostics.findings import DeltaSpecError, UnknownDeltaError
from deltaspec.planning.passes import regions_of

subsets = st.lists(st.sampled_from(NAMES), unique=True, max_size=4)
steps = st.one_of(
    st.tuples(st.sampled_from(["attach", "detach", "only", "within", "raise within"]), subsets),
    st.tuples(
        st.sampled_from(["train", "save and load", "deepcopy", "state dict", "evaluate", "training mode", "detached"])
    ),
)


class Boom(Exception):
    """Raised on purpose."""


def take(compiled: CompiledModel, step: tuple[Any, ...], inputs: Any) -> CompiledModel:
    """Do one step; give the model to go on with."""
    match step:
        case ("attach", names):
            assert compiled.attach(*names) is compiled
        case ("detach", names):
            assert compiled.detach(*names) is compiled
        case ("only", names):
            compiled.only(*names)
            assert set(compiled.attached) == set(names)
        case ("within", names):
            before = compiled.attached
            with compiled.only(*names):
                assert set(compiled.attached) == set(names)
                outputs(compiled, inputs)
            assert compiled.attached == before
        case ("raise within", names):
            before = compiled.attached
            with pytest.raises(Boom), compiled.only(*names), compiled.detached():
                assert compiled.attached == ()
                raise Boom
            assert compiled.attached == before
        case ("train",):
            train(compiled, inputs)
        case ("save and load",):
            with tempfile.TemporaryDirectory() as folder:
                compiled.save(folder)
                kept = outputs(compiled, inputs)
                move(compiled, 9)
                compiled.load(folder)
                assert same(outputs(compiled, inputs), kept)
        case ("deepcopy",):
            twin = copy.deepcopy(compiled)
            kept = outputs(compiled, inputs)
            move(compiled, 13)
            compiled.detach()
            assert same(outputs(twin, inputs), kept)
            return twin
        case ("state dict",):
            kept = outputs(compiled, inputs)
            state = {key: value.clone() for key, value in compiled.state_dict().items()}
            move(compiled, 17)
            compiled.load_state_dict(state, strict=True)
            assert same(outputs(compiled, inputs), kept)
        case ("evaluate",):
            compiled.eval()
        case ("training mode",):
            compiled.train()
        case ("detached",):
            with compiled.detached():
                assert compiled.attached == ()
    return compiled


def train(compiled: CompiledModel, inputs: Any) -> None:
    """Take one step of SGD on the attached deltas, in training mode."""
    parameters = list(compiled.trainable_parameters()) if compiled.attached else []
    if not parameters:
        return
    mode = compiled.training
    compiled.train()
    args, kwargs = call_arguments(inputs)
    with seed(2):
        floats(compiled(*args, **kwargs))[0].pow(2).mean().backward()
    # Not every attached parameter is reached: a trained copy stands over an earlier delta's change.
    assert any(parameter.grad is not None for parameter in parameters)
    torch.optim.SGD(parameters, lr=0.1).step()
    compiled.zero_grad()
    compiled.train(mode)


@pytest.mark.parametrize("architecture", TARGETS)
@settings(max_examples=12, database=None, phases=[Phase.generate], derandomize=True)
@given(walk=st.lists(steps, min_size=2, max_size=6))
def test_bits_depend_on_the_active_set_and_the_tensors_alone(architecture, walk):
    model, inputs, _ = planned(architecture)
    before = snapshot(model, identity=("state dict",) not in walk)
    fresh = snapshot(clone(model))
    original = outputs(model, inputs)
    compiled, oracle = build(architecture), build(architecture)
    for step in walk:
        compiled = take(compiled, step, inputs)
        # The oracle has the same tensors and comes to the active set in one step, from nothing.
        oracle.detach()
        for name, delta in compiled.deltas.items():
            oracle.deltas[name].load_state_dict(delta.state_dict())
        oracle.attach(*compiled.attached) if compiled.attached else oracle.detach()
        assert oracle.attached == compiled.attached == tuple(n for n in NAMES if n in compiled.attached)
        assert same(outputs(compiled, inputs), outputs(oracle, inputs)), step
        flags = {p.requires_grad for n, p in compiled.backbone.named_parameters() if not n.startswith(RESERVED + ".")}
        assert flags == ({False} if compiled.attached else {True})
        mode = compiled.training
        with compiled.detached():
            assert same(outputs(compiled, inputs), original), step
            compiled.eval()
            assert differences(fresh, snapshot(compiled.backbone, skip=RESERVED)) == [], step
            compiled.train(mode)
    # Loading a state dict copies into the storage that both share: the same values, but writes. All else counts none.
    assert differences(before, snapshot(model, identity=("state dict",) not in walk)) == []


@pytest.mark.parametrize("architecture", ["gpt2", "traceable-symbolic"])
def test_the_chain_follows_the_spec_whatever_the_order_of_attaching(architecture):
    _, inputs, _ = planned(architecture)
    results = []
    for order in (NAMES, NAMES[::-1], ("bias", "spare", "norms", "wide", "low")):
        compiled = build(architecture).detach()
        for name in order:
            compiled.attach(name)
        assert compiled.attached == NAMES
        results.append(outputs(compiled, inputs))
    assert same(results[0], results[1])
    assert same(results[0], results[2])


def test_attaching_and_detaching_are_idempotent_and_chain():
    compiled = build("traceable-modules")
    assert compiled.attached == ("norms", "low", "wide", "bias")
    compiled.attach("low").attach("low")
    assert compiled.attached == ("norms", "low", "wide", "bias")
    assert compiled.attach().attached == NAMES
    assert compiled.detach("low", "low").detach("low").attached == ("norms", "wide", "bias", "spare")
    assert compiled.detach().detach().attached == ()


def test_each_delta_has_an_effect_of_its_own():
    _, inputs, _ = planned("bert")
    compiled = build("bert")
    seen = []
    for name in NAMES:
        compiled.only(name)
        assert all(not same(outputs(compiled, inputs), other) for other in seen)
        seen.append(outputs(compiled, inputs))


@pytest.mark.parametrize("act", ["attach", "detach", "only", "merge"])
def test_an_unknown_name_lists_the_known_ones_and_changes_nothing(act):
    compiled = build("traceable-modules")
    before = compiled.attached
    with pytest.raises(UnknownDeltaError, match=r"DS434.*'nroms'") as caught:
        getattr(compiled, act)("nroms", "low")
    assert "did you mean 'norms'? known: norms, low, wide, bias, spare" in str(caught.value)
    assert isinstance(caught.value, KeyError) and isinstance(caught.value, DeltaSpecError)
    assert compiled.attached == before


def test_trained_copies_of_one_part_take_turns():
    model = ARCHITECTURES["traceable-modules"].model()
    deltas = [{"name": n, "method": "full", "target": "head", "attached": n == "a"} for n in "ab"]
    compiled = deltaspec.compile(model, {"deltaspec": 1, "deltas": deltas}, capture="modules")
    move(compiled, 1)
    for act in (lambda: compiled.attach("b"), compiled.attach, lambda: compiled.only("a", "b")):
        with pytest.raises(DeltaSpecError, match=r"DS436.*'a' and 'b' both replace head\.(weight|bias)"):
            act()
        assert compiled.attached == ("a",)
    inputs = ARCHITECTURES["traceable-modules"].inputs()
    first = outputs(compiled, inputs)
    compiled.only("b")
    assert not same(outputs(compiled, inputs), first)
    compiled.only("a")
    assert same(outputs(compiled, inputs), first)


def test_switching_deltas_makes_no_new_forward_and_touches_the_modules_of_the_sets_alone():
    compiled = build("gpt2")
    compiled.only("low")
    sites = {site.site.row.fqn for site in compiled.plan["low"].sites}
    first = {n: m.__dict__["forward"] for n, m in compiled.backbone.named_modules() if "forward" in m.__dict__}
    taken = regions_of(compiled.plan)
    assert first.keys() == sites | {*taken["dropout"], *taken["feed_forward"]}
    compiled.detach()
    assert not [n for n, m in compiled.backbone.named_modules() if "forward" in m.__dict__]
    compiled.attach("low")
    again = {n: m.__dict__["forward"] for n, m in compiled.backbone.named_modules() if "forward" in m.__dict__}
    assert all(again[name] is first[name] for name in sites)


def test_the_hooks_of_other_libraries_on_a_site_still_run_and_stay():
    chosen = ARCHITECTURES["bert"]
    model = chosen.model()
    calls = []
    query = "bert.encoder.layer.0.attention.self.query"
    model.get_submodule(query).register_forward_hook(lambda m, i, o: calls.append("post"))
    model.get_submodule(query).register_forward_pre_hook(lambda m, i: calls.append("pre"))
    compiled = deltaspec.compile(model, spec("bert"))
    calls.clear()
    for names in (("low",), ()):
        compiled.only(*names)
        outputs(compiled, chosen.inputs())
        assert calls == ["pre", "post"]
        calls.clear()
