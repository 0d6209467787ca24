"""Working inside of attention: modules that call no function of transformers, or another one later, are refused."""

from typing import Any

import pytest
from prefixes import compiled
from prompt_models import build, llama, tokens
from torch import nn
from transformers import BloomConfig, BloomForCausalLM

import deltaspec
from deltaspec.diagnostics.findings import DeltaSpecError


def refused(model: nn.Module, **delta: Any) -> str:
    with pytest.raises(DeltaSpecError) as caught:
        deltaspec.plan(model, {"deltaspec": 1, "deltas": [{"name": "p", "method": "prefix", **delta}]})
    return str(caught.value)


def test_refusals() -> None:
    assert "does not call transformers' attention" in refused(build(llama), target="**.q_proj")
    assert "does not call transformers' attention" in refused(build(llama), target={"role": "mlp"})
    bloom = BloomForCausalLM(BloomConfig(vocab_size=90, hidden_size=32, n_layer=2, n_head=4))
    assert "BloomAttention" in refused(bloom, target={"role": "attn"})
    plain = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, batch_first=True), 1)
    assert "MultiheadAttention" in refused(plain, target="**.self_attn")
    assert "not on the parameter" in refused(build(llama), target={"parameter": "**.q_proj.weight"})
    flex = build(llama)
    flex.config._attn_implementation = "flex_attention"
    assert "sdpa or eager" in refused(flex)


def test_an_attention_function_chosen_later_is_refused() -> None:
    c, ids = compiled(build(llama), tokens=3), tokens()
    c.backbone.set_attn_implementation("eager")
    assert c(input_ids=ids).logits.isfinite().all()
    c.config._attn_implementation = "flex_attention"
    with pytest.raises(DeltaSpecError, match="DS438"):
        c(input_ids=ids)
