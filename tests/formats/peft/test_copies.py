"""Adapters that PEFT wrote of whole copies, of rows and of allocated ranks: LN tuning, trainable tokens, AdaLoRA."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from beside_peft import as_theirs, moved, saved
from peft_bases import base, run

import deltaspec

ADALORA = {"target_modules": ["q_proj", "v_proj"], "total_step": 10, "init_r": 4, "target_r": 2}


@pytest.mark.parametrize(
    ("name", "config", "methods"),
    [
        ("llama", peft.LNTuningConfig(target_modules=["input_layernorm", "norm"]), ["norm"]),
        ("gpt2", peft.LNTuningConfig(), ["norm"]),
        ("convolutions", peft.LNTuningConfig(target_modules=["bn", "ln"]), ["full"]),
        ("llama", peft.LNTuningConfig(target_modules=["q_proj", "norm"]), ["full"]),
        ("llama", peft.TrainableTokensConfig(token_indices=[1, 3, 9]), ["trainable_tokens"]),
        ("tied", peft.TrainableTokensConfig(token_indices=[1, 3, 9]), ["trainable_tokens"]),
        ("gpt2", peft.TrainableTokensConfig(token_indices=[1, 3]), ["trainable_tokens"]),
        ("t5", peft.TrainableTokensConfig(token_indices=[1, 3], target_modules=["shared"]), ["trainable_tokens"]),
        ("llama", peft.AdaLoraConfig(**ADALORA, lora_alpha=3, lora_dropout=0.1), ["adalora"]),
        ("gpt2", peft.AdaLoraConfig(**{**ADALORA, "target_modules": ["c_attn"], "target_r": 8}), ["adalora"]),
        ("convolutions", peft.AdaLoraConfig(**{**ADALORA, "target_modules": ["conv"]}), ["adalora"]),
    ],
    ids=lambda given: given.peft_type.value if isinstance(given, peft.PeftConfig) else str(given),
)
def test_options(name: str, config: Any, methods: list[str], tmp_path: Path) -> None:
    compiled = as_theirs(base(name), moved(base(name), config), tmp_path / "french", run(name))
    assert [delta.method for delta in compiled.plan.deltas] == methods


def test_ranks_that_were_dropped_stay_dropped(tmp_path: Path) -> None:
    made = moved(base("llama"), peft.AdaLoraConfig(**ADALORA))
    kept = [[True, False, True, False], [False] * 4, [True] * 4, [False, True, True, True]]
    layers = [name for name, module in made.base_model.model.named_modules() if hasattr(module, "ranknum")]
    pattern = {f"{name}.lora_E.default": mask for name, mask in zip(layers, kept, strict=True)}
    with torch.no_grad():
        for name, mask in zip(layers, kept, strict=True):
            made.base_model.model.get_submodule(name).lora_E["default"][~torch.tensor(mask)] = 0
    before = run("llama")(made).detach()
    made.peft_config["default"].rank_pattern = pattern
    compiled = deltaspec.restore(base("llama"), saved(made, tmp_path / "french"))
    torch.testing.assert_close(run("llama")(compiled), before, atol=1e-5, rtol=1e-5)
    singular = compiled.deltas["french"].tensor(f"{layers[0]}.singular")
    assert (singular != 0).tolist() == kept[0]


def test_copies_with_modules_inside_are_refused(tmp_path: Path) -> None:
    folder = saved(moved(base("llama"), peft.LNTuningConfig(target_modules=["mlp"])), tmp_path)
    with pytest.raises(deltaspec.DeltaSpecError, match="PEFT itself does not find again"):
        deltaspec.restore(base("llama"), folder)
