"""Random walks over attaching, detaching, training, files and copies; the bits must be what the active set says."""

from __future__ import annotations

import copy
import tempfile
from functools import cache
from typing import Any

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from models import ARCHITECTURES
from torch import Tensor, nn

import deltaspec
from deltaspec.backbone.clone import clone
from deltaspec.backbone.inputs import call_arguments
from deltaspec.backbone.reserved import RESERVED
from deltaspec.compiler.compile import compile_plan
from deltaspec.compiler.compiled import CompiledModel
from deltaspec.contract.snapshot import differences, snapshot
from deltaspec.contract.trial import floats, same, seed
from deltaspec.diagnostics.findings import DeltaSpecError, UnknownDeltaError
from deltaspec.planning.plan import Plan
from deltaspec.planning.resolve import plan

NAMES = ("norms", "low", "wide", "bias", "spare")
TARGETS: dict[str, dict[str, Any]] = {
    "bert": {
        "norms": {"role": "norm"},
        "low": {"role": ["attn.q", "attn.v"]},
        "wide": {"role": "block"},
        "bias": {"role": "mlp.up"},
    },
    "gpt2": {
        "norms": {"role": "norm"},
        "low": {"role": ["attn.qkv", "mlp.up"]},
        "wide": {"role": "attn"},
        "bias": {"role": "mlp.up"},
    },
    "t5": {
        "norms": {"role": "norm"},
        "low": {"role": ["attn.q", "mlp.down"]},
        "wide": {"role": "block"},
        "bias": {"role": "attn.o"},
    },
    "branching": {"norms": "norm", "low": ["block.*", "embed"], "wide": "block.down", "bias": ["block.up", "head"]},
    "traceable-modules": {"norms": ["bn", "norm"], "low": ["conv", "up"], "wide": "up", "bias": ["conv", "bn"]},
    "traceable-symbolic": {"norms": ["bn", "norm"], "low": ["conv", "up"], "wide": "up", "bias": ["conv", "bn"]},
}


def spec(architecture: str) -> dict[str, Any]:
    """Five deltas that meet on many sites, of four methods; the last starts detached."""
    where = TARGETS[architecture]
    return {
        "deltaspec": 1,
        "deltas": [
            {"name": "norms", "method": "full", "target": where["norms"]},
            {"name": "low", "method": "lora", "params": {"rank": 2, "dropout": 0.1}, "target": where["low"]},
            {"name": "wide", "method": "adapter", "params": {"width": 3}, "target": where["wide"]},
            {"name": "bias", "method": "bitfit", "target": where["bias"]},
            {"name": "spare", "method": "lora", "params": {"rank": 3}, "target": where["low"], "attached": False},
        ],
    }


@cache
def planned(architecture: str) -> tuple[nn.Module, Any, Plan]:
    chosen = ARCHITECTURES[architecture]
    model, inputs = chosen.model(), chosen.inputs()
    return model, inputs, plan(model, spec(architecture), example_inputs=inputs)


def build(architecture: str) -> CompiledModel:
    model, _, made = planned(architecture)
    compiled = compile_plan(model, made, ARCHITECTURES[architecture].capture)
    move(compiled, 5)
    return compiled


@torch.no_grad()
def move(compiled: CompiledModel, number: int) -> None:
    """Change all delta tensors, the same way for the same number."""
    generator = torch.Generator().manual_seed(number)
    for delta in compiled.deltas.values():
        for parameter in delta.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)


@torch.no_grad()
def outputs(model: nn.Module, inputs: Any) -> list[Tensor]:
    """Run in evaluation mode, then go back to the mode that the model was in."""
    args, kwargs = call_arguments(inputs)
    mode = model.training
    result = floats(model.eval()(*args, **kwargs))
    model.train(mode)
    return result


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
    parameters = list(compiled.trainable_parameters())
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
@settings(max_examples=12, deadline=None, database=None, phases=[Phase.generate], derandomize=True)
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
    assert first.keys() == sites
    compiled.detach()
    assert not [n for n, m in compiled.backbone.named_modules() if "forward" in m.__dict__]
    compiled.attach("low")
    again = {n: m.__dict__["forward"] for n, m in compiled.backbone.named_modules() if "forward" in m.__dict__}
    assert all(again[name] is first[name] for name in sites)


def test_flags_that_were_off_before_stay_off_after():
    model = ARCHITECTURES["bert"].model()
    for name, parameter in model.named_parameters():
        parameter.requires_grad = "layer.1" in name
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    compiled = deltaspec.compile(model, spec("bert"))
    for names in (("low",), (), ("low", "wide"), ()):
        compiled.only(*names)
        found = {n: p.requires_grad for n, p in compiled.backbone.named_parameters() if not n.startswith(RESERVED)}
        assert found == (dict.fromkeys(flags, False) if names else flags)
    assert {n for n, p in compiled.named_parameters() if p.requires_grad and n.startswith(f"backbone.{RESERVED}")}


def test_batch_statistics_of_the_backbone_never_move_and_those_of_a_delta_do():
    chosen = ARCHITECTURES["traceable-modules"]
    model, inputs = chosen.model(), chosen.inputs()
    compiled = build("traceable-modules").train()
    base = model.bn.running_mean.clone()
    own = dict(compiled.deltas["norms"].tensors())["bn.running_mean"]
    for active, moves in ((("low",), False), (("norms", "low"), True)):
        compiled.only(*active)
        kept = own.clone()
        compiled(inputs)
        assert torch.equal(own, kept) is not moves
        assert torch.equal(compiled.backbone.bn.running_mean, base)
    compiled.detach()
    compiled.eval()
    assert same(outputs(compiled, inputs), outputs(model, inputs))


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
