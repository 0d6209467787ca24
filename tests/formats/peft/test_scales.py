"""Adapters that PEFT wrote of scales, shared and random parts: (IA)³, VeRA, HiRA, DeLoRA, MiSS, FourierFT, C3A."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
from beside_peft import as_theirs, moved
from peft_bases import base, run

QV = {"target_modules": ["q_proj", "v_proj"]}
THREE = {"target_modules": ["q_proj", "v_proj", "down_proj"]}


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("llama", peft.IA3Config()),
        ("t5", peft.IA3Config()),
        ("gpt2", peft.IA3Config()),
        ("llama", peft.IA3Config(target_modules=["k_proj", "up_proj"], feedforward_modules=["up_proj"])),
        ("llama", peft.IA3Config(target_modules=["down_proj"], feedforward_modules=[])),
        ("convolutions", peft.IA3Config(target_modules=["conv", "grouped", "conv3"], feedforward_modules=["grouped"])),
        ("convolutions", peft.IA3Config(target_modules=["conv", "fc"], feedforward_modules="conv|fc")),
        ("llama", peft.VeraConfig(**THREE, r=5, vera_dropout=0.1)),
        ("llama", peft.VeraConfig(**THREE, r=5, save_projection=False, projection_prng_key=42)),
        ("gpt2", peft.VeraConfig(target_modules=["c_attn", "c_fc"], r=5, save_projection=False)),
        ("llama", peft.HiraConfig(target_modules=["q_proj", "embed_tokens"], r=3, hira_dropout=0.1)),
        ("llama", peft.HiraConfig(**QV, r=3, rank_pattern={"q_proj": 2}, init_weights="gaussian")),
        ("gpt2", peft.HiraConfig(target_modules=["c_attn"], r=3, hira_dropout=0.1)),
        ("convolutions", peft.HiraConfig(target_modules=["conv", "dilated", "conv1", "conv3"], r=3)),
        ("convolutions", peft.HiraConfig(target_modules=["conv", "conv1", "conv3"], r=3, hira_dropout=0.1)),
        ("llama", peft.DeloraConfig(**QV, r=3, rank_pattern={"q_proj": 2}, lambda_pattern={"v_proj": 3})),
        ("bert", peft.DeloraConfig(target_modules=["query"], r=3, module_dropout=0.1, bias="all", init_weights=False)),
        ("llama", peft.MissConfig(**QV, r=3, miss_dropout=0.1)),
        ("llama", peft.MissConfig(**QV, r=4, init_weights="bat")),
        ("llama", peft.MissConfig(**QV, r=3, init_weights="mini", mini_r=4)),
        ("llama", peft.FourierFTConfig(**QV, n_frequency=20, n_frequency_pattern={"v_proj": 7}, random_loc_seed=5)),
        ("gpt2", peft.FourierFTConfig(target_modules=["c_attn"], n_frequency=20, scaling=80.0, init_weights=True)),
    ],
    ids=lambda given: given if isinstance(given, str) else given.peft_type.value,
)
def test_options(name: str, config: Any, tmp_path: Path) -> None:
    as_theirs(base(name), moved(base(name), config), tmp_path / "french", run(name))


@pytest.mark.parametrize("options", [{"block_size": 4, "block_size_pattern": {"v_proj": 8}}, {"block_size": 8}])
def test_circulant_blocks_whose_backward_is_pefts_own(options: dict[str, Any], tmp_path: Path) -> None:
    made = moved(base("llama"), peft.C3AConfig(**QV, **options))
    as_theirs(base("llama"), made, tmp_path / "french", run("llama"), gradients=False)
