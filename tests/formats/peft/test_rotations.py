"""OFT, BOFT, HRA and RoAd adapters that PEFT wrote, read as PEFT reads them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
from beside_peft import as_theirs, moved, saved
from peft_bases import base, run

import deltaspec

QV = {"target_modules": ["q_proj", "v_proj"]}


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("llama", peft.OFTConfig(**QV, oft_block_size=4)),
        ("llama", peft.OFTConfig(target_modules=["q_proj", "down_proj"], oft_block_size=10)),  # 8, and 12
        ("llama", peft.OFTConfig(**QV, r=2, oft_block_size=0, use_cayley_neumann=False, block_share=True)),
        ("llama", peft.OFTConfig(**QV, oft_block_size=4, num_cayley_neumann_terms=3)),
        ("llama", peft.OFTConfig(**QV, oft_block_size=4, num_cayley_neumann_terms=2)),
        ("llama", peft.OFTConfig(**QV, oft_block_size=4, coft=True, eps=0.1, bias="oft_only")),
        ("llama", peft.OFTConfig(**QV, oft_block_size=4, coft=True, eps=0.1, block_share=True)),
        ("llama", peft.OFTConfig(target_modules=["embed_tokens"], oft_block_size=4)),
        ("convolutions", peft.OFTConfig(target_modules=["conv"], oft_block_size=9)),
        ("convolutions", peft.OFTConfig(target_modules=["grouped"], r=4, oft_block_size=0)),
        ("llama", peft.BOFTConfig(target_modules=["k_proj", "down_proj"], boft_block_size=4)),
        ("bert", peft.BOFTConfig(target_modules=["query"], boft_block_size=0, boft_block_num=2, bias="boft_only")),
        ("convolutions", peft.BOFTConfig(target_modules=["conv"], boft_block_size=6, boft_dropout=0.1)),
        ("llama", peft.HRAConfig(**QV, r=3)),
        ("llama", peft.HRAConfig(**QV, r=4, apply_GS=True, bias="hra_only")),
        ("convolutions", peft.HRAConfig(target_modules=["conv", "fc"], r=4)),
        ("llama", peft.RoadConfig(**QV, group_size=4)),
        ("llama", peft.RoadConfig(**QV, group_size=4, variant="road_2")),
        ("bert", peft.RoadConfig(target_modules=["query", "value"], group_size=8, variant="road_4")),
    ],
    ids=lambda given: given if isinstance(given, str) else given.peft_type.value,
)
def test_options(name: str, config: Any, tmp_path: Path) -> None:
    as_theirs(base(name), moved(base(name), config), tmp_path / "french", run(name))


@pytest.mark.parametrize("config", [peft.BOFTConfig, peft.HRAConfig])
def test_a_convolution_that_peft_runs_otherwise_is_refused(config: Any, tmp_path: Path) -> None:
    folder = saved(moved(base("convolutions"), config(target_modules=["dilated"])), tmp_path)
    with pytest.raises(deltaspec.DeltaSpecError, match=r"DS544.*leaves out its dilation"):
        deltaspec.restore(base("convolutions"), folder)


def test_what_peft_never_calls_is_left_out(tmp_path: Path) -> None:
    config = peft.OFTConfig(**QV, oft_block_size=4, module_dropout=0.5)
    compiled = as_theirs(base("llama"), moved(base("llama"), config), tmp_path / "french", run("llama"))
    assert compiled.plan["french"].params.block_dropout == 0


def test_patches_cannot_be_merged(tmp_path: Path) -> None:
    config = peft.OFTConfig(target_modules=["conv"], oft_block_size=9)
    compiled = deltaspec.restore(base("convolutions"), saved(moved(base("convolutions"), config), tmp_path / "french"))
    with pytest.raises(deltaspec.DeltaSpecError, match="DS435.*not the weight"):
        compiled.merge("french")
