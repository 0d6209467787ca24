"""Adapters written for a serving engine: its check passes, outputs stay, and what it cannot serve is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from as_peft import same_in_peft, stirred
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig

import deltaspec
from deltaspec import engines

IDS = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6]])
UNEVEN = {
    "name": "a", "method": "lora", "params": {"rank": 4, "scaling": "rslora"}, "target": {"role": ["attn.q", "attn.v"]},
    "overrides": [{"match": {"role": "attn.v"}, "params": {"rank": 2, "alpha": 3}}],
}  # fmt: skip


@pytest.fixture(scope="module")
def llama() -> Any:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    return AutoModelForCausalLM.from_config(LlamaConfig(**sizes, vocab_size=30)).eval()


def logits(model: Any) -> Tensor:
    found: Tensor = model(input_ids=IDS).logits
    return found


@pytest.mark.parametrize("engine", ["vllm", "sglang", "openvino"])
def test_checks_pass_and_outputs_stay(llama: Any, engine: str, tmp_path: Path) -> None:
    compiled = stirred(llama, UNEVEN)
    same_in_peft(compiled, llama, tmp_path, logits, engine=engine)
    assert engines.check(tmp_path, llama, engine) == []
    config = json.loads((tmp_path / "adapter_config.json").read_bytes())
    if engine == "sglang":
        assert (config["rank_pattern"], config["alpha_pattern"], config["use_rslora"]) == ({}, {}, False)


def test_what_is_low_rank_goes_out_as_lora(llama: Any, tmp_path: Path) -> None:
    vera = {"name": "a", "method": "vera", "params": {"rank": 5}, "target": {"role": ["attn.q", "attn.v"]}}
    theirs = same_in_peft(stirred(llama, vera), llama, tmp_path, logits, engine="vllm")
    assert theirs.peft_config["default"].peft_type == "LORA"


def test_what_an_engine_cannot_serve_is_refused(llama: Any, tmp_path: Path) -> None:
    dora = {"name": "a", "method": "lora", "params": {"rank": 2, "use_dora": True}, "target": {"role": "attn.q"}}
    head = {"name": "h", "method": "full", "target": {"role": "head"}}
    with pytest.raises(deltaspec.DeltaSpecError, match="DoRA is not what the engine computes"):
        stirred(llama, dora).save_as("peft", tmp_path / "out", engine="vllm")
    with pytest.raises(deltaspec.DeltaSpecError, match="<model>:modules_to_save: .* rejected by vLLM") as caught:
        stirred(llama, UNEVEN, head).save_as("peft", tmp_path / "out", engine="vllm")
    assert caught.value.diagnostics[0].suggestion == "merge it into a plain model: c.merge()"
    with pytest.raises(deltaspec.DeltaSpecError, match="DS627"):
        stirred(llama, UNEVEN).save_as("peft", tmp_path / "out", engine="vlm")
    assert not (tmp_path / "out").exists()
    same_in_peft(stirred(llama, dora), llama, tmp_path, logits, engine="vllm", approximate=16)
