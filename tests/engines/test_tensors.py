"""Facts that follow from tensors and base together: experts, convolutions, tables, heads, layers."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from models import Traceable
from peft import LoraConfig, get_peft_model
from peft_adapters import damaged
from safetensors.torch import save_file
from tiny_models import COMMON, llama
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

from deltaspec import engines

SIZES = {**COMMON, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}


def mixtral() -> nn.Module:
    return MixtralForCausalLM(MixtralConfig(**SIZES, num_key_value_heads=1, num_local_experts=3))


def written(folder: Path, model: nn.Module, **options: Any) -> Path:
    with warnings.catch_warnings(action="ignore"):
        get_peft_model(model, LoraConfig(**{"r": 4, **options})).save_pretrained(folder)
    return folder


def said(folder: Path, model: nn.Module, engine: str) -> list[str]:
    return [f"{f.code} {f.message}" for f in engines.check(folder, model, engine)]


def test_stacked_experts(tmp_path):
    stacks = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    folder = written(tmp_path, mixtral(), target_modules=["q_proj"], target_parameters=stacks)
    assert said(folder, mixtral(), "peft") == []
    (found,) = said(folder, mixtral(), "vllm")
    assert found.startswith("DS610 rejected by vLLM: target_parameters") and "model.layers.{0..1}.mlp.experts:" in found


def test_experts_as_older_models_name_them(tmp_path):
    folder = written(tmp_path, mixtral(), target_modules=["q_proj"])
    place = "base_model.model.model.layers.{}.block_sparse_moe.experts.{}.w1.lora_{}.weight"
    shapes = {"A": (4, 16), "B": (24, 4)}
    keys = {place.format(n, e, f): torch.zeros(shapes[f]) for n in range(2) for e in range(3) for f in shapes}
    save_file(keys, folder / "adapter_model.safetensors")
    assert said(folder, mixtral(), "vllm") == said(folder, mixtral(), "peft") == []
    (found,) = said(folder, mixtral(), "lorax")
    assert found.startswith("DS610") and "layers.{0..1}.block_sparse_moe.experts.{0..2}.w1:" in found
    (found,) = said(folder, llama(), "vllm")  # a base without experts has no such modules
    assert found.startswith("DS615")


def test_convolutions(tmp_path):
    folder = written(tmp_path, Traceable(), target_modules=["conv", "up"])
    assert said(folder, Traceable(), "peft") == []
    (found,) = said(folder, Traceable(), "vllm")
    assert found.startswith("DS614 rejected by vLLM: a LoRA of modules of kind conv at conv:")


def test_heads_that_are_tied(tmp_path):
    def tied() -> nn.Module:
        return LlamaForCausalLM(LlamaConfig(**SIZES, tie_word_embeddings=True))

    folder = written(tmp_path, tied(), target_modules=["lm_head", "q_proj"])
    (found,) = said(folder, tied(), "llama.cpp")
    assert found.startswith("DS613 rejected by llama.cpp: a LoRA of the output head that is tied to the embeddings")
    assert said(folder, llama(), "llama.cpp") == []


def test_tables_that_were_resized(tmp_path):
    def resized() -> nn.Module:
        model = llama()
        model.resize_token_embeddings(50)
        return model

    folder = written(tmp_path, resized(), target_modules=["embed_tokens"])
    codes = [text.split()[0] for text in said(folder, llama(), "vllm")]
    assert codes == ["DS607", "DS617"]  # the base's table, and a factor of the LoRA
    assert said(folder, resized(), "vllm") == []


def test_updates_on_some_layers(tmp_path):
    folder = written(
        tmp_path, llama(), target_modules=["q_proj", "v_proj"], layers_pattern="layers", layers_to_transform=[1]
    )
    assert said(folder, llama(), "vllm") == []
    (finding,) = engines.check(folder, llama(), "lorax")
    assert "model.layers.1.self_attn.{q_proj,v_proj}" in finding.message
    assert (
        finding.suggestion == f"deltaspec export {folder} --for lorax -o OUT writes zeros for the layers that have none"
    )
    assert said(folder, llama(1), "lorax")[0].startswith("DS616")


@pytest.mark.parametrize("largest, expected", [(47, []), (48, ["DS609"])])
def test_added_tokens(largest, expected, tmp_path):
    folder = damaged(tmp_path / "adapter")
    (folder / "added_tokens.json").write_text(f'{{"<mine>": {largest}}}')
    assert [text.split()[0] for text in said(folder, llama(), "sglang")] == expected


def test_values_of_a_key_that_is_not_known(tmp_path):
    for number, value in enumerate((None, False, [], 0)):
        assert said(damaged(tmp_path / str(number), {"merge_weights": value}), llama(), "vllm") == []
    (found,) = said(damaged(tmp_path / "set", {"merge_weights": True}), llama(), "vllm")
    assert found.startswith('DS612 ignored by vLLM: the key "merge_weights", which PEFT\'s LoRA has not')
