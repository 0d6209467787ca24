"""Observing: one forward on meta tensors says what is called, read and how wide, and leaves the model as it is."""

from __future__ import annotations

import pytest
import torch
from counted import graphs_of
from models import ARCHITECTURES, TRANSFORMERS
from readers import INPUTS, Reader, build

from deltaspec.backbone.clone import clone
from deltaspec.backbone.inputs import dummy_inputs
from deltaspec.backbone.observe import observe
from deltaspec.backbone.recorder import Observation
from deltaspec.contract.snapshot import differences, snapshot


@pytest.mark.parametrize("architecture", [*TRANSFORMERS, "branching", "traceable-modules"])
def test_observing_leaves_the_model_as_it_is(architecture):
    model = ARCHITECTURES[architecture].model().train()
    before, state = snapshot(model, identity=True), torch.random.get_rng_state()
    seen, failure = observe(model, ARCHITECTURES[architecture].inputs())
    assert failure is None
    assert differences(before, snapshot(model, identity=True)) == []
    assert torch.equal(state, torch.random.get_rng_state())
    assert set(seen) == {name for name, _ in model.named_modules(remove_duplicate=False)}


@pytest.mark.parametrize("architecture", TRANSFORMERS)
def test_transformers_models_bring_inputs_of_their_own(architecture):
    model = ARCHITECTURES[architecture].model()
    given, failure = observe(model)
    assert failure is None and dummy_inputs(model) is not None
    assert {k for k, v in given.items() if v.called} == {
        k for k, v in observe(model, ARCHITECTURES[architecture].inputs())[0].items() if v.called
    }


def test_widths_of_composite_modules_are_seen():
    seen, _ = observe(ARCHITECTURES["llama"].model())
    assert (seen["model.layers.0"].in_width, seen["model.layers.0"].width) == (32, 32)
    assert (seen["model.layers.0.mlp.gate_proj"].in_width, seen["model.layers.0.mlp.gate_proj"].width) == (32, 64)
    assert seen["model.layers.0.self_attn"].width == 32
    assert seen["lm_head"].width == 90


@pytest.mark.parametrize("architecture", ["llama", "branching"])
def test_what_is_compiled_afterwards_is_compiled(architecture):
    observe(ARCHITECTURES[architecture].model(), ARCHITECTURES[architecture].inputs())
    compiled, graphs = graphs_of(torch.nn.Linear(2, 2))
    compiled(torch.zeros(1, 2))
    assert len(graphs) == 1


def test_readers_are_named():
    seen, _ = observe(build(Reader), INPUTS)
    assert seen["read"] == Observation(False, host="", reads=("weight",))
    assert (seen["both"].called, seen["both"].host, seen["both"].reads) == (True, "", None)
    assert not seen["idle"].called


def test_a_forward_that_fails_is_told_and_raises_nothing():
    seen, failure = observe(build(Reader), torch.zeros(2, 7))
    assert failure is not None and "RuntimeError" in failure
    assert isinstance(seen, dict)
    model = clone(build(Reader), device="meta")
    assert observe(model, INPUTS)[1] is None


@pytest.mark.parametrize("kind", ["BartForSequenceClassification", "BartForConditionalGeneration", "DebertaV2Model"])
def test_a_forward_that_looks_at_values_is_seen_without_weights(kind):
    import transformers

    sizes = {"vocab_size": 50, "hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32}
    if kind.startswith("Bart"):
        halves = {f"{half}_{name}": 2 for half in ("encoder", "decoder") for name in ("layers", "attention_heads")}
        sizes = {"vocab_size": 50, "d_model": 16, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32, **halves}
    made = getattr(transformers, kind)
    config = made.config_class(**sizes, num_hidden_layers=2)
    with torch.device("meta"):
        bare = made(config)
    seen, failure = observe(bare)
    assert failure is None and seen == observe(made(config))[0]
    assert all(p.is_meta for p in bare.parameters())
