"""LoRA adapters that PEFT wrote, with its options, read as PEFT reads them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from beside_peft import as_theirs, moved, saved
from peft.tuners.lora.config import BdLoraConfig
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig

import deltaspec

IDS = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6]])


@pytest.fixture(scope="module")
def llama() -> Any:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2}
    config = LlamaConfig(**sizes, num_key_value_heads=1, vocab_size=30)
    return AutoModelForCausalLM.from_config(config).eval()


def logits(model: Any) -> Tensor:
    found: Tensor = model(input_ids=IDS).logits
    return found


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": ["q_proj", "v_proj"], "r": 4, "rank_pattern": {"v_proj": 2}, "alpha_pattern": {"q_proj": 5}},
        {"target_modules": r".*layers\.[01]\.mlp\.(up|down)_proj", "use_rslora": True, "r": 3},
        {"target_modules": "all-linear", "use_dora": True, "r": 2},
        {"target_modules": ["q_proj", "o_proj"], "exclude_modules": ["layers.1.self_attn.o_proj"], "lora_bias": True},
        {"target_modules": ["k_proj"], "layers_to_transform": [0, 2], "modules_to_save": ["lm_head"]},
        {"target_modules": ["embed_tokens", "gate_proj"], "r": 2},
        {"target_modules": ["q_proj"], "trainable_token_indices": [1, 4, 9]},
    ],
    ids=lambda options: "-".join(map(str, options)),
)
def test_options(llama: Any, options: dict[str, Any], tmp_path: Path) -> None:
    as_theirs(llama, moved(llama, peft.LoraConfig(**options)), tmp_path / "french", logits)


@pytest.mark.parametrize(
    ("options", "note"),
    [
        ({"velora_config": peft.VeloraConfig(num_groups=2)}, "VeLoRA compresses"),
        ({"monteclora_config": peft.MontecloraConfig(num_samples=2, buffer_size=2)}, "MonteCLoRA draws"),
        ({"use_bdlora": BdLoraConfig(target_modules_bd_a=["q_proj"], target_modules_bd_b=["up_proj"], nblocks=2),
          "target_modules": ["q_proj", "up_proj"]}, "BD-LoRA has blocks"),
    ],
    ids=["velora", "monteclora", "bdlora"],
)  # fmt: skip
def test_variants_that_are_plain_lora_outside_of_training(
    llama: Any, options: dict[str, Any], note: str, tmp_path: Path
) -> None:
    made = moved(llama, peft.LoraConfig(**{"target_modules": ["q_proj", "v_proj"], "r": 4} | options))
    compiled = as_theirs(llama, made, tmp_path / "french", logits, gradients="use_bdlora" not in options)
    assert any(note in line for line in compiled.plan["french"].notes)


def test_blocks_that_do_not_fit(llama: Any, tmp_path: Path) -> None:
    blocks = BdLoraConfig(target_modules_bd_a=["q_proj"], nblocks=2)
    folder = saved(moved(llama, peft.LoraConfig(target_modules=["q_proj"], r=4, use_bdlora=blocks)), tmp_path / "a")
    file = folder / "adapter_config.json"
    config = json.loads(file.read_text())
    for wrong in ({"nblocks": 3}, {"nblocks": "two"}, {"unknown": True}):
        file.write_text(json.dumps(config | {"use_bdlora": config["use_bdlora"] | wrong}))
        with pytest.raises(deltaspec.DeltaSpecError, match="DS54[34]"):
            deltaspec.restore(llama, folder)
