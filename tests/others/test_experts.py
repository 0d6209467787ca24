"""Stacked experts of transformers' mixtures: which of their sides is what an expert is given."""

from __future__ import annotations

import pytest
import torch
from mixtures import IDS, SIZES, gpt_oss, mixtral, qwen3_moe
from torch import nn
from transformers import (
    AriaTextConfig,
    AriaTextForCausalLM,
    Llama4ForCausalLM,
    Llama4TextConfig,
    OpenAIPrivacyFilterConfig,
    OpenAIPrivacyFilterForTokenClassification,
)

import deltaspec


def llama4() -> nn.Module:
    experts = {"intermediate_size": 24, "intermediate_size_mlp": 24, "num_local_experts": 4, "num_experts_per_tok": 1}
    return Llama4ForCausalLM(Llama4TextConfig(**SIZES, **experts))


def aria() -> nn.Module:
    return AriaTextForCausalLM(AriaTextConfig(**SIZES, intermediate_size=24, moe_num_experts=4, moe_topk=2))


def privacy_filter() -> nn.Module:
    experts = {"intermediate_size": 24, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 8}
    experts |= {"pad_token_id": 0, "eos_token_id": 2}
    return OpenAIPrivacyFilterForTokenClassification(OpenAIPrivacyFilterConfig(**SIZES, **experts))


@pytest.mark.parametrize(
    ("build", "turned"),
    [(mixtral, False), (qwen3_moe, False), (gpt_oss, True), (llama4, True), (aria, True), (privacy_filter, True)],
)
def test_experts_know_which_side_their_input_is_on(build, turned):
    """The first factor is as wide as what an expert is given: `[in]` of either layout."""
    with torch.device("meta"):
        model = build()
    target = {"path": "**.experts", "parameter": ["gate_up_proj", "down_proj"]}
    made = deltaspec.plan(
        model, {"deltaspec": 1, "deltas": [{"name": "d", "method": "lora", "params": {"rank": 2}, "target": target}]}
    )
    for planned in made.sites:
        assert planned.site.row.transposed is turned
        width = 16 if planned.site.parameter == "gate_up_proj" else planned.site.row.in_features
        down, up = (next(t for t in planned.tensors if t.name == name) for name in ("down", "up"))
        assert down.shape == (4, 2, width) and up.shape[1] != width


def test_a_fresh_and_a_trained_delta_on_experts_of_llama4():
    model = llama4().eval()
    target = {"path": "**.experts", "parameter": ["gate_up_proj", "down_proj"]}
    delta = {"name": "d", "method": "lora", "params": {"rank": 2, "alpha": 4}, "target": target}
    compiled = deltaspec.compile(model, {"deltaspec": 1, "deltas": [delta]})
    plain = model(IDS).logits
    assert torch.equal(compiled(IDS).logits, plain)
    with torch.no_grad():
        for parameter in compiled.trainable_parameters():
            parameter.normal_(std=0.3)
        assert not torch.allclose(compiled(IDS).logits, plain, atol=1e-2)
        torch.testing.assert_close(compiled.merge()(IDS).logits, compiled(IDS).logits, rtol=1e-4, atol=1e-4)
        experts = model.model.layers[0].feed_forward.experts
        down, up = (
            next(v for k, v in compiled.deltas["d"].tensors() if k.endswith(f"experts.gate_up_proj.{name}"))
            for name in ("down", "up")
        )
        wanted = experts.gate_up_proj + 2 * (up @ down).mT
        merged = compiled.merge().model.layers[0].feed_forward.experts
        torch.testing.assert_close(merged.gate_up_proj, wanted)
