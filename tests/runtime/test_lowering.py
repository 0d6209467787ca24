"""Weights that are read without a call: deltas go to the weight, or are refused; none is silently idle."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from readers import INPUTS, Attention, Encoder, Lists, Reader, Recurrent, build, by_hand, compiled, refusal
from torch import Tensor, nn

import deltaspec

CASES: list[tuple[type[nn.Module], Any, Tensor]] = [
    (Attention, "attn.out_proj", INPUTS),
    (Attention, ["attn.out_proj", "head"], INPUTS),
    (Reader, "read", INPUTS),
    (Reader, "both", INPUTS),
    (Reader, ["read", "both"], INPUTS),
    (Encoder, {"type": "Linear"}, INPUTS),
    (Encoder, "encoder.layers.1.linear1", INPUTS),
    (Recurrent, "embed", torch.tensor([[1, 2, 19], [0, 3, 7]])),
]


@pytest.mark.parametrize("mode", ["eval", "train", "grad"])
@pytest.mark.parametrize(
    ("kind", "target", "inputs"), CASES, ids=lambda value: str(getattr(value, "__name__", ""))[:20]
)
def test_lora_reaches_weights_that_are_read(kind, target, inputs, mode):
    made = compiled(kind, "lora", target, inputs, rank=4)
    expected = by_hand(kind, made).train(mode == "train")
    made.train(mode == "train")
    with torch.set_grad_enabled(mode == "grad"):
        torch.testing.assert_close(made(inputs), expected(inputs), rtol=1e-4, atol=1e-5)
        plain = build(kind).train(mode == "train")
        assert not torch.allclose(made(inputs), plain(inputs), atol=1e-3)
        torch.testing.assert_close(made.merge().train(mode == "train")(inputs), expected(inputs), rtol=1e-4, atol=1e-5)
        assert torch.equal(made.detach()(inputs), plain(inputs))


@pytest.mark.parametrize(
    ("kind", "target", "inputs"), CASES, ids=lambda value: str(getattr(value, "__name__", ""))[:20]
)
def test_such_deltas_train(kind, target, inputs):
    made = compiled(kind, "lora", target, inputs, rank=4)
    for mode in (True, False):
        made.zero_grad()
        made.train(mode)(inputs).pow(2).sum().backward()
        assert all(p.grad is not None and bool(p.grad.count_nonzero()) for p in made.deltas["d"].parameters())


@pytest.mark.parametrize(("kind", "target"), [(Attention, "attn.out_proj"), (Reader, "read"), (Encoder, "**.linear2")])
def test_methods_around_a_call_are_refused_where_there_is_none(kind, target):
    message = refusal(kind, "adapter", target)
    assert "DS404" in message and "without calling it" in message and "use a method that changes the weight" in message


def test_dropout_has_no_place_where_there_is_no_call():
    assert "DS402" in refusal(Attention, "lora", "attn.out_proj", dropout=0.1)
    assert "overrides" in refusal(Attention, "lora", "attn.out_proj", dropout=0.1)


def test_a_module_that_no_forward_reaches_is_refused():
    message = refusal(Reader, "lora", ["read", "idle"])
    assert "DS403" in message and "idle" in message and "read" not in message.split("1 site:")[1].splitlines()[0]


def test_a_bias_that_is_not_read_is_refused():
    assert "not its bias" in refusal(Reader, "bitfit", "read")
    assert "no forward reads read.bias" in refusal(Reader, "full", "read")
    delta = {"name": "d", "method": "full", "target": {"parameter": "weight", "path": "read"}}
    plan = deltaspec.plan(build(Reader), {"deltaspec": 1, "deltas": [delta]}, example_inputs=INPUTS)
    assert plan.sites[0].fqn == "read.weight"


def test_the_bias_of_an_out_proj_is_reached():
    made = compiled(Attention, "bitfit", "attn.out_proj")
    with torch.no_grad():
        torch.testing.assert_close(made(INPUTS), by_hand(Attention, made)(INPUTS), rtol=1e-5, atol=1e-6)


FULL: list[tuple[type[nn.Module], Any, Tensor, Callable[[nn.Module], list[nn.Parameter]]]] = [
    (Lists, "scales", INPUTS, lambda m: list(m.scales)),
    (Lists, {"parameter": "shift"}, INPUTS, lambda m: [m.shift]),
    (Recurrent, "lstm", torch.tensor([[1, 2, 19]]), lambda m: list(m.lstm.parameters())),
    (Encoder, "encoder.layers.0", INPUTS, lambda m: list(m.encoder.layers[0].parameters())),
    (Attention, "attn", INPUTS, lambda m: list(m.attn.parameters())),
]


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(("kind", "target", "inputs", "chosen"), FULL, ids=lambda value: getattr(value, "__name__", ""))
def test_trained_copies_reach_parameters_that_are_read(kind, target, inputs, chosen, training):
    made = compiled(kind, "full", target, inputs).train(training)
    expected = build(kind).train(training)
    tensors = list(made.deltas["d"].parameters())
    assert [tuple(t.shape) for t in tensors] == [tuple(p.shape) for p in chosen(expected)]
    with torch.no_grad():
        plain = expected(inputs)
        for parameter, tensor in zip(chosen(expected), tensors, strict=True):
            parameter.copy_(tensor)
        torch.testing.assert_close(made(inputs), expected(inputs), rtol=1e-5, atol=1e-6)
        assert not torch.allclose(made(inputs), plain, atol=1e-3)
        torch.testing.assert_close(made.merge()(inputs), expected(inputs), rtol=1e-5, atol=1e-6)
    made(inputs).pow(2).sum().backward()
    assert all(t.grad is not None and bool(t.grad.count_nonzero()) for t in tensors)
    assert torch.equal(made.detach()(inputs), build(kind).train(training)(inputs))


def test_without_inputs_torchs_own_bypasses_are_known_all_the_same():
    spec = {
        "deltaspec": 1,
        "deltas": [{"name": "d", "method": "lora", "params": {"rank": 4}, "target": "attn.out_proj"}],
    }
    made = deltaspec.compile(build(Attention), spec)
    with torch.no_grad():
        for parameter in made.deltas["d"].parameters():
            parameter.add_(0.1)
        torch.testing.assert_close(made(INPUTS), by_hand(Attention, made)(INPUTS), rtol=1e-4, atol=1e-5)
