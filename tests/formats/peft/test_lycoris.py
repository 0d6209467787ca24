"""LoHa and LoKr adapters that PEFT wrote, read as PEFT reads them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
from beside_peft import as_theirs, moved
from peft_bases import base, run

QV = {"target_modules": ["q_proj", "v_proj"]}
ALL = ["conv", "dilated", "grouped", "conv1", "fc"]


@pytest.mark.parametrize(
    ("name", "config", "gradients"),
    [
        (
            "llama",
            peft.LoHaConfig(**QV, r=2, rank_pattern={"q_proj": 3}, alpha_pattern={r"layers\.1\..*v_proj": 5}),
            True,
        ),
        ("llama", peft.LoHaConfig(**QV, r=2, alpha=5, rank_dropout=0.2, module_dropout=0.1), True),
        ("convolutions", peft.LoHaConfig(target_modules=ALL, r=2), True),
        ("convolutions", peft.LoHaConfig(target_modules=ALL, r=2, use_effective_conv2d=True), False),
        ("llama", peft.LoKrConfig(**QV, r=2, rank_pattern={"q_proj": 3}, alpha_pattern={"v_proj": 5}), True),
        ("llama", peft.LoKrConfig(**QV, r=1, decompose_both=True, decompose_factor=4), True),
        ("llama", peft.LoKrConfig(target_modules="all-linear", r=1, init_weights="lycoris"), True),
        ("llama", peft.LoKrConfig(**QV, r=1, rank_dropout=0.2, rank_dropout_scale=True, module_dropout=0.1), True),
        ("convolutions", peft.LoKrConfig(target_modules=ALL, r=1), True),
        ("convolutions", peft.LoKrConfig(target_modules=ALL, r=8), True),  # scrambled on conv1
        ("convolutions", peft.LoKrConfig(target_modules=["conv", "grouped"], r=1, use_effective_conv2d=True), True),
    ],
    ids=lambda given: given.peft_type.value if isinstance(given, peft.PeftConfig) else str(given),
)
def test_options(name: str, config: Any, gradients: bool, tmp_path: Path) -> None:
    as_theirs(base(name), moved(base(name), config), tmp_path / "french", run(name), gradients=gradients)


def test_the_order_of_peft_is_said(tmp_path: Path) -> None:
    config = peft.LoKrConfig(target_modules=["conv", "conv1"], r=8)
    made = moved(base("convolutions"), config)
    compiled = as_theirs(base("convolutions"), made, tmp_path / "french", run("convolutions"))
    orders = {site.fqn: site.params.order for site in compiled.plan["french"].sites}
    assert orders == {"conv": "kronecker", "conv1": "peft_conv1d"}
