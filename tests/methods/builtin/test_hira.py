from __future__ import annotations

from typing import Any

import peft
import pytest
from weight_methods import agree, bert, check, check_bypassed, check_training, gpt2, llama, net, refusal

QV = ["**.query", "**.value"]


def tensors(layer: Any) -> dict[str, Any]:
    embedding = "default" in layer.hira_embedding_A
    return {
        "down": layer.hira_embedding_A["default"] if embedding else layer.hira_A["default"],
        "up": layer.hira_embedding_B["default"] if embedding else layer.hira_B["default"],
    }


@pytest.mark.parametrize(
    ("made", "target", "modules"),
    [
        (bert, QV, ["query", "value"]),
        (gpt2, "**.c_attn", ["c_attn"]),
        (llama, ["**.q_proj", "**.down_proj"], ["q_proj", "down_proj"]),
        (net, ["fc", "out"], ["fc", "out"]),
        (net, "emb", ["emb"]),
        (net, "conv", ["conv"]),
        (net, "conv1", ["conv1"]),
    ],
)
def test_agrees_with_peft(made: Any, target: Any, modules: list[str]) -> None:
    agree(made(), "hira", {"rank": 4}, target, peft.HiraConfig(r=4, target_modules=modules), tensors, std=0.3)


@pytest.mark.parametrize(
    ("made", "target"),
    [(bert, QV), (gpt2, "**.c_attn"), (net, "emb"), (net, "conv"), (net, "grouped"), (net, "conv1"), (net, "fc")],
)
def test_promises(made: Any, target: Any) -> None:
    check(made(), "hira", {"rank": 4}, target, std=0.5)
    check(made(), "hira", {"rank": 4, "init": "normal"}, target, std=0.5)


def test_bypassed_and_training() -> None:
    check_bypassed("hira", {"rank": 4})
    check_training("hira", {"rank": 4}, QV, rate=1.0)


def test_refusals() -> None:
    assert "LayerNorm" in refusal(*bert(), "hira", {}, "**.LayerNorm")
