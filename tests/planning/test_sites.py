"""The sites of one delta: shared, tied and bypassed modules, overrides, and why a site cannot be."""

from __future__ import annotations

from typing import Any

import torch
from nets import INPUT, QV, Net, codes, refused, roberta, spec
from torch import nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    T5Config,
    T5ForConditionalGeneration,
)

from deltaspec.planning.resolve import plan


def test_default_roles_stand_in_for_a_target() -> None:
    named = plan(roberta(), spec({"target": QV}))
    default = plan(roberta(), spec({}))
    assert [s.fqn for s in default.sites] == [s.fqn for s in named.sites]
    assert default == named


def test_default_roles_of_a_fused_projection() -> None:
    with torch.device("meta"):
        model = GPT2LMHeadModel(GPT2Config())
    planned = plan(model, spec({}))
    assert [s.fqn for s in planned.sites] == [f"transformer.h.{i}.attn.c_attn" for i in range(12)]
    assert planned.trainable == 12 * 8 * (768 + 3 * 768)


def test_a_module_under_two_names_is_one_site() -> None:
    model = Net()
    model.same = model.head
    assert [s.fqn for s in plan(model, spec({"target": ["head", "same"]})).sites] == ["head"]
    assert [s.fqn for s in plan(model, spec({"target": "same"})).sites] == ["head"]


def test_a_site_selected_twice_is_one_site() -> None:
    planned = plan(Net(), spec({"target": {"any": ["head", {"type": "Linear"}]}}))
    assert len(planned.sites) == len({s.fqn for s in planned.sites}) == 6


def test_full_on_a_container_takes_every_module_with_parameters_below() -> None:
    planned = plan(Net(), spec({"method": "full", "target": "blocks.1"}))
    assert [s.fqn for s in planned.sites] == ["blocks.1.up", "blocks.1.down", "blocks.1.norm"]
    assert planned.trainable == sum(p.numel() for p in Net().blocks[1].parameters())


def test_full_on_a_module_and_on_its_own_parameter_takes_it_once() -> None:
    target = {"any": ["head", {"path": "head", "parameter": "bias"}, {"path": "spare", "parameter": "bias"}]}
    planned = plan(Net(), spec({"method": "full", "target": target}))
    assert [s.fqn for s in planned.sites] == ["head", "spare.bias"]
    assert planned.trainable == 8 * 3 + 3 + 3


def test_a_module_that_no_forward_reaches_is_an_error() -> None:
    document = spec({"target": ["head", "spare"]})
    (finding,) = refused(Net(), document, example_inputs=INPUT)
    assert finding.code == "DS403" and "1 site: spare" in finding.message
    planned = plan(Net(), document)
    assert "not proven" in planned.notes[0] and "example_inputs" in str(planned)


def test_a_bypassed_module_takes_what_works_on_the_weight_only() -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

        def forward(self, x: torch.Tensor) -> Any:
            return self.attention(x, x, x)[0]

    planned = plan(Attention(), spec({"target": "**.out_proj"}), example_inputs=INPUT)
    assert planned.sites[0].site.host == "attention"
    assert "through the weight" in str(planned)
    document = spec({"method": "adapter", "target": "**.out_proj"})
    (finding,) = refused(Attention(), document, example_inputs=INPUT)
    assert finding.code == "DS404" and "attention reads" in finding.message and "lora" in str(finding.suggestion)


def test_widths_of_blocks_come_from_the_forward() -> None:
    document = spec({"method": "adapter", "params": {"width": 4}, "target": "blocks.*"})
    planned = plan(Net(), document, example_inputs=INPUT)
    assert planned.trainable == 2 * (4 * 8 + 4 + 8 * 4 + 8)
    (finding,) = refused(Net(), document)
    assert finding.code == "DS402" and "example_inputs" in str(finding.suggestion)


# Tied parameters


def tied_gpt2() -> GPT2LMHeadModel:
    return GPT2LMHeadModel(GPT2Config(vocab_size=20, n_positions=8, n_embd=8, n_layer=1, n_head=2))


def test_an_additive_delta_on_a_tied_module_says_what_it_leaves() -> None:
    planned = plan(tied_gpt2(), spec({"target": "lm_head"}))
    assert planned["d0"].notes == ("lm_head.weight is tied to transformer.wte.weight; the delta changes lm_head only",)


def test_full_on_a_tied_parameter_must_say_what_is_meant() -> None:
    assert codes(tied_gpt2(), spec({"method": "full", "target": "lm_head"})) == ["DS402"]


def test_full_together_trains_one_tensor_at_all_places() -> None:
    document = spec({"method": "full", "params": {"tied": "together"}, "target": "lm_head"})
    planned = plan(tied_gpt2(), document)
    assert {s.fqn for s in planned.sites} == {"lm_head", "transformer.wte.weight"}
    assert planned.trainable == 20 * 8
    assert "one tensor, trained for all of them" in planned["d0"].notes[0]
    document["deltas"][0]["params"] = {"tied": "alone"}
    assert {s.fqn for s in plan(tied_gpt2(), document).sites} == {"lm_head"}


def tiny_t5() -> T5ForConditionalGeneration:
    config = T5Config(vocab_size=20, d_model=8, d_kv=4, d_ff=16, num_layers=1, num_heads=2, decoder_start_token_id=0)
    return T5ForConditionalGeneration(config)


def test_an_embedding_that_is_only_a_holder_points_to_the_one_that_runs() -> None:
    # T5's forward calls encoder.embed_tokens; `shared` holds the same weight and is never called.
    (finding,) = refused(tiny_t5(), spec({"target": "shared"}))
    assert finding.code == "DS403" and "select that one" in str(finding.suggestion)
    assert plan(tiny_t5(), spec({"target": "encoder.embed_tokens"})).trainable == 8 * (20 + 8)


def test_full_together_takes_holders_that_no_forward_calls() -> None:
    for target in ("shared", "encoder.embed_tokens"):
        planned = plan(tiny_t5(), spec({"method": "full", "params": {"tied": "together"}, "target": target}))
        assert {s.site.row.fqn for s in planned.sites} >= {"shared", "encoder.embed_tokens", "decoder.embed_tokens"}
        assert planned.trainable == 20 * 8


# Overrides


def test_the_first_override_that_matches_wins() -> None:
    overrides = [
        {"match": "blocks.1.up", "params": {"rank": 2}},
        {"match": "**.up", "params": {"rank": 4, "alpha": 32.0}},
    ]
    target = {"path": "blocks.**", "type": "Linear"}
    planned = plan(Net(), spec({"target": target, "params": {"rank": 1}, "overrides": overrides}))
    assert {s.fqn: (s.params.rank, s.params.alpha, s.override) for s in planned.sites} == {
        "blocks.0.up": (4, 32.0, 1),
        "blocks.0.down": (1, 16.0, None),
        "blocks.1.up": (2, 16.0, 0),
        "blocks.1.down": (1, 16.0, None),
    }
    assert planned.trainable == (4 + 1 + 2 + 1) * (8 + 32)
    assert "override: rank=4 alpha=32" in str(planned)


def test_an_override_that_matches_no_site_is_an_error() -> None:
    document = spec({"target": "**.up", "overrides": [{"match": "head", "params": {"rank": 2}}]})
    (finding,) = refused(Net(), document)
    assert finding.code == "DS405" and "which has 2 sites" in finding.message
    document["deltas"][0]["overrides"][0]["match"] = {"path": "head", "optional": True}
    assert plan(Net(), document)


def test_an_override_in_the_shadow_of_another_is_an_error() -> None:
    overrides = [{"match": "**.up", "params": {"rank": 2}}, {"match": "blocks.1.up", "params": {"rank": 4}}]
    (finding,) = refused(Net(), spec({"target": "**.up", "overrides": overrides}))
    assert finding.code == "DS405" and "override 2" in finding.message and "earlier" in str(finding.suggestion)


# Refusals and findings


def test_a_refusal_is_one_finding_and_not_one_a_layer() -> None:
    (finding,) = refused(roberta(), spec({"target": "encoder.layer.*.attention"}))
    assert finding.code == "DS402"
    assert "12 sites: encoder.layer.{0..11}.attention" in finding.message and "adapter" in str(finding.suggestion)


def test_no_default_role_is_an_error() -> None:
    (finding,) = refused(Net(), spec({}))
    assert finding.code == "DS350" and finding.suggestion is not None


def test_a_width_that_no_forward_could_tell_says_why() -> None:
    document = spec({"method": "reft", "target": "blocks.0"})
    (finding,) = refused(Net(), document, example_inputs=torch.zeros(2, 3))
    assert finding.code == "DS402" and "no forward could be run here: RuntimeError" in str(finding.suggestion)
    (finding,) = refused(Net(), document)
    assert str(finding.suggestion).endswith("no forward could be run here: no example inputs")
