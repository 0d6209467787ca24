"""Training steps with passes, beside the same steps without, on every architecture and in every way to train."""

from __future__ import annotations

import pytest
import torch
from models import ARCHITECTURES, TRANSFORMERS
from torch import nn
from training import assert_same_gradients, gradients, kept_bytes, serve_small, spread

import deltaspec

PARAMS = {"plain": {"rank": 2}, "dropout": {"rank": 2, "dropout": 0.5}}


def both(name: str, params: dict[str, object], passes: object = True) -> tuple[nn.Module, nn.Module]:
    """Compile with passes and without, with equal tensors."""
    chosen = ARCHITECTURES[name]
    target = {"type": "Conv1D" if name == "gpt2" else "Linear"}
    spec = {"deltaspec": 1, "deltas": [{"name": "a", "method": "lora", "params": params, "target": target}]}
    found = []
    for asked in (passes, False):
        model = deltaspec.compile(
            chosen.model(), spec, capture=chosen.capture, example_inputs=chosen.inputs(), passes=asked
        )
        spread(model)
        found.append(model)
    return found[0], found[1]


@pytest.mark.parametrize("params", PARAMS)
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_gradients_are_those_without_passes(name, params, monkeypatch):
    serve_small(monkeypatch)
    ours, plain = both(name, PARAMS[params])
    inputs = ARCHITECTURES[name].inputs()
    for model in (ours, plain):
        model.train(params == "dropout")
    for _ in range(2):  # the first forward finds out what activations are for
        assert_same_gradients(gradients(ours, inputs), gradients(plain, inputs))


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_less_is_kept(name, monkeypatch):
    serve_small(monkeypatch)
    ours, plain = both(name, PARAMS["dropout"])
    inputs = ARCHITECTURES[name].inputs()
    ours.train()
    plain.train()
    kept = [kept_bytes(ours, inputs) for _ in range(2)]
    assert kept[0] == kept[1]
    assert kept[0] < 0.8 * kept_bytes(plain, inputs)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("name", ["bert", "gpt2", "llama"])
def test_checkpointing(name, reentrant, monkeypatch):
    serve_small(monkeypatch)
    ours, plain = both(name, PARAMS["dropout"])
    inputs = ARCHITECTURES[name].inputs()
    for model in (ours, plain):
        model.train()
        if reentrant:
            model.backbone.enable_input_require_grads()
    expected = gradients(plain, inputs)
    ours.backbone.gradient_checkpointing_enable({"use_reentrant": reentrant})
    assert_same_gradients(gradients(ours, inputs), expected)


@pytest.mark.parametrize("name", ["gpt2", "llama", "vit"])
def test_under_autocast_they_are_as_exact_as_without_passes(name, monkeypatch):
    serve_small(monkeypatch)
    ours, plain = both(name, PARAMS["plain"])
    inputs = ARCHITECTURES[name].inputs()
    exact = gradients(plain, inputs)
    errors = []
    for model in (ours, plain):
        with torch.autocast("cpu", torch.bfloat16):
            found = gradients(model, inputs)
        errors.append(max((found[n] - exact[n]).norm() / exact[n].norm() for n in exact))
    assert errors[0] < 2 * errors[1] < 0.2


def test_offloading_what_is_kept_works(monkeypatch):
    serve_small(monkeypatch)
    ours, plain = both("llama", PARAMS["dropout"])
    inputs = ARCHITECTURES["llama"].inputs()
    ours.train()
    plain.train()
    with torch.autograd.graph.save_on_cpu():
        found = gradients(ours, inputs)
    assert_same_gradients(found, gradients(plain, inputs))


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama", "t5"])
def test_gradients_of_gradients(name, monkeypatch):
    serve_small(monkeypatch)
    ours, plain = both(name, PARAMS["plain"])
    args = ARCHITECTURES[name].inputs()
    found = []
    for model in (ours.double(), plain.double()):
        model.backbone.set_attn_implementation("eager")  # the fused ones have no second derivative
        parameters = [p for p in model.parameters() if p.requires_grad]
        loss = model(**args).logits.square().sum()
        first = torch.autograd.grad(loss, parameters, create_graph=True)
        penalty = sum(gradient.square().sum() for gradient in first)
        second = torch.autograd.grad(penalty, parameters)
        found.append({str(i): gradient for i, gradient in enumerate((*first, *second))})
    assert_same_gradients(*found, tolerance=1e-6)  # Llama's norms compute in float32
