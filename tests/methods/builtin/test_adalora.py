from __future__ import annotations

from typing import Any

import peft
import pytest
from weight_methods import agree, bert, check, check_bypassed, check_training, gpt2, llama, net, refusal

QV = ["**.query", "**.value"]


def tensors(layer: Any) -> dict[str, Any]:
    return {
        "down": layer.lora_A["default"],
        "singular": (layer.lora_E["default"], lambda e: e.flatten()),
        "up": layer.lora_B["default"],
    }


@pytest.mark.parametrize(
    ("made", "target", "modules"),
    [
        (bert, QV, ["query", "value"]),
        (gpt2, "**.c_attn", ["c_attn"]),
        (llama, ["**.q_proj", "**.down_proj"], ["q_proj", "down_proj"]),
        (net, ["fc", "out"], ["fc", "out"]),
        (net, "conv", ["conv"]),
    ],
)
def test_agrees_with_peft(made: Any, target: Any, modules: list[str]) -> None:
    config = peft.AdaLoraConfig(init_r=6, target_r=4, lora_alpha=12, total_step=10, target_modules=modules)
    params = {"rank": 4, "initial_rank": 6, "alpha": 12.0}
    agree(made(), "adalora", params, target, config, tensors, std=0.3)


@pytest.mark.parametrize(
    ("made", "target"), [(bert, QV), (gpt2, "**.c_attn"), (net, "emb"), (net, "conv"), (net, "grouped"), (net, "conv1")]
)
def test_promises(made: Any, target: Any) -> None:
    check(made(), "adalora", {"rank": 3, "initial_rank": 5, "alpha": 16.0, "dropout": 0.1}, target, std=0.5)


def test_bypassed_and_training() -> None:
    check_bypassed("adalora", {"alpha": 2000.0})
    check_training("adalora", {"alpha": 100.0}, QV)


def test_refusals() -> None:
    assert "set initial_rank: 24" in refusal(*net(), "adalora", {"rank": 16}, "fc")
    assert "LayerNorm" in refusal(*bert(), "adalora", {}, "**.LayerNorm")
