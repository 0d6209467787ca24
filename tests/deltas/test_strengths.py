"""Strength: how much of what a delta adds acts. It is data, 0 is the bare backbone, 1 the trained delta."""

from __future__ import annotations

from fractions import Fraction

import numpy
import pytest
import torch
from counted import graphs_of
from mixed_rows import PROMPTS, batch, build, entry, ids
from models import Traceable
from tiny_models import ARCHITECTURES, BUILDERS, base
from torch import nn
from torch.nn import functional as F

import deltaspec
from deltaspec.contract.trial import disturb
from deltaspec.diagnostics.findings import DeltaSpecError
from deltaspec.methods.registry import builtin_methods
from deltaspec.testing import check_method

METHODS = tuple(name for name in builtin_methods() if name not in ("soft_prompt", "p_tuning"))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("method", METHODS)
def test_none_of_it_is_the_bare_backbone_and_all_of_it_the_delta(method, architecture):
    compiled = build(base(architecture), entry("a", method))
    given = batch(architecture)
    with torch.no_grad():
        bare = compiled(**given).logits
        compiled.only("a")
        whole = compiled(**given).logits
        compiled.only({"a": 0.0})
        assert torch.equal(compiled(**given).logits, bare)
        compiled.attach("a", strength=1.0)
        assert torch.equal(compiled(**given).logits, whole) and compiled.strengths == {"a": 1.0}
        compiled.attach("a", strength=1 - 1e-6)  # through the form that reads strengths
        torch.testing.assert_close(compiled(**given).logits, whole, rtol=1e-4, atol=1e-4)
        compiled.attach("a", strength=0.5)
        half = compiled(**given).logits
        assert not torch.equal(half, bare) and not torch.equal(half, whole)
        compiled.detach()
        assert torch.equal(compiled(**given).logits, bare) and compiled.strengths == {}


@pytest.mark.parametrize("method", ["soft_prompt", "p_tuning"])
def test_prompts_act_wholly_or_not_at_all(method):
    compiled = build(base("llama"), entry("a", method))
    for act in (lambda: compiled.attach("a", strength=0.5), lambda: compiled.only({"a": 0.5})):
        with pytest.raises(DeltaSpecError, match="DS446.*tokens"):
            act()
        assert compiled.attached == ()
    compiled.attach("a", strength=1.0)
    assert compiled.attached == ("a",)


def test_it_scales_the_update_of_a_weight():
    torch.manual_seed(0)
    layer = nn.Linear(6, 4)
    compiled = build(nn.Sequential(layer), entry("a", "lora", "0"), entry("b", "lora", "0"))
    x = torch.randn(3, 6)
    update = {n: d.tensor("0.up") @ d.tensor("0.down") * 8 for n, d in compiled.deltas.items()}
    compiled.only({"a": 0.7, "b": -0.3})
    weight = layer.weight + 0.7 * update["a"] - 0.3 * update["b"]
    torch.testing.assert_close(compiled(x), F.linear(x, weight, layer.bias))
    torch.testing.assert_close(compiled.merge()[0].weight, weight)
    assert compiled.strengths == {"a": 0.7, "b": -0.3}


def test_it_scales_statistics_from_the_backbones_own():
    model, x = nn.Sequential(nn.BatchNorm1d(6)).train(), torch.randn(8, 6)
    model(x * 3 + 1)
    check_method("full", model.eval(), x, target="0")


def test_changing_it_rebuilds_and_recompiles_nothing():
    compiled = build(BUILDERS["short llama"]().eval(), entry("a", "lora"), entry("b", "adapter"))
    fast, graphs = graphs_of(compiled)
    with torch.no_grad():
        for strength in (0.2, 0.4, -1.0, 3.0):
            compiled.only({"a": strength, "b": strength / 2})
            installed = compiled.backbone.model.layers[0].self_attn.q_proj.__dict__["forward"]
            torch.testing.assert_close(fast(ids()).logits, compiled(ids()).logits)
            assert len(graphs) == 1
    compiled.attach("a", strength=0.9)
    assert compiled.backbone.model.layers[0].self_attn.q_proj.__dict__["forward"] is installed


def test_contexts_put_strengths_back_and_names_alone_mean_all_of_it():
    compiled = build(base("llama"), entry("a", "lora"), entry("b", "adapter"))
    compiled.attach("a", strength=0.5)
    with pytest.raises(RuntimeError, match="inside"), compiled.only({"a": 0.1, "b": 0.2}):
        assert compiled.strengths == {"a": 0.1, "b": 0.2}
        raise RuntimeError("inside")
    assert compiled.strengths == {"a": 0.5}
    with compiled.detached():
        assert compiled.strengths == {}
    assert compiled.strengths == {"a": 0.5}
    compiled.attach("b")
    assert compiled.strengths == {"a": 0.5, "b": 1.0}
    compiled.detach("b")
    assert compiled.strengths == {"a": 0.5}
    compiled.only("a")
    assert compiled.strengths == {"a": 1.0}


def test_after_inference_mode_a_cast_and_a_copy_it_can_still_change():
    compiled = build(base("llama"), entry("a", "lora"))
    with torch.inference_mode():
        compiled.only({"a": 0.5})
        compiled(ids())
    compiled.only({"a": 0.25})
    compiled.double()
    twin = __import__("copy").deepcopy(compiled)
    with torch.no_grad():
        before = compiled(ids()).logits
        assert before.dtype is torch.float64
        twin.only({"a": 0.0})
        assert torch.equal(compiled(ids()).logits, before) and twin.strengths == {"a": 0.0}
        bare = twin(ids()).logits
        with compiled.detached():
            assert torch.equal(compiled(ids()).logits, bare)


def test_training_in_part_trains_the_delta():
    compiled = build(base("llama"), entry("a", "lora"))
    gradients = []
    for strength in (1.0, 0.5, 0.0):
        compiled.zero_grad()
        compiled.only({"a": strength})
        compiled(ids()).logits.square().sum().backward()
        gradients.append(sum(float(p.grad.abs().sum()) for p in compiled.deltas["a"].parameters()))
    assert gradients[0] > 0 and gradients[1] > 0 and gradients[2] == 0


@pytest.mark.parametrize("strength", [float("nan"), float("inf"), 1e39, 10**400, "much", True, None])
def test_wrong_strengths_are_refused(strength):
    compiled = build(base("llama"), entry("a", "lora"))
    with pytest.raises((TypeError, ValueError), match="strength of 'a'"):
        compiled.only({"a": strength})
    assert compiled.attached == ()


@pytest.mark.parametrize("strength", [numpy.float32(0.5), numpy.float64(0.5), Fraction(1, 2)])
def test_any_real_number_is_a_strength(strength):
    compiled = build(base("llama"), entry("a", "lora"))
    compiled.only({"a": strength})
    assert compiled.strengths == {"a": 0.5}


def test_it_works_on_a_traced_model():
    compiled = deltaspec.compile(Traceable().eval(), {"deltaspec": 1, "deltas": [entry("a", "lora", ["up", "conv"])]})
    assert compiled.capture == "symbolic"
    disturb(compiled)
    x = torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        bare = compiled(x)
        compiled.only({"a": 0.0})
        assert torch.equal(compiled(x), bare)
        compiled.attach("a", strength=0.5)
        assert not torch.equal(compiled(x), bare)


def test_prefix_in_part_is_between():
    assert "prefix" in PROMPTS  # its rows are tested elsewhere, its strength here
    compiled = build(base("llama"), entry("a", "prefix"))
    with torch.no_grad():
        bare = compiled(ids()).logits
        compiled.only("a")
        whole = compiled(ids()).logits
        compiled.only({"a": 0.01})
        assert (compiled(ids()).logits - bare).norm() < 0.1 * (whole - bare).norm()
