from __future__ import annotations

from typing import Any

import peft
import pytest
from weight_methods import agree, bert, check, check_bypassed, check_training, gpt2, llama, net, refusal

QV = ["**.query", "**.value"]


@pytest.mark.parametrize(
    ("params", "options"),
    [
        ({"rank": 8}, {"r": 8}),
        ({"rank": 5}, {"r": 5}),
        ({"rank": 8, "variant": "mini", "width": 4}, {"r": 8, "init_weights": "mini", "mini_r": 4}),
        ({"rank": 8, "variant": "bat"}, {"r": 8, "init_weights": "bat"}),
    ],
    ids=str,
)
@pytest.mark.parametrize(
    ("made", "target", "modules"),
    [
        (bert, QV, ["query", "value"]),
        (llama, ["**.q_proj", "**.down_proj"], ["q_proj", "down_proj"]),
        (net, ["fc", "out"], ["fc", "out"]),
    ],
)
def test_agrees_with_peft(made: Any, target: Any, modules: list[str], params: Any, options: Any) -> None:
    config = peft.MissConfig(target_modules=modules, **options)
    agree(made(), "miss", params, target, config, lambda m: {"shard": m.miss_block["default"]})


@pytest.mark.parametrize(
    "params",
    [
        {"rank": 8},
        {"rank": 5, "dropout": 0.1},
        {"rank": 5, "variant": "mini", "width": 4},
        {"rank": 8, "variant": "bat"},
    ],
    ids=str,
)
@pytest.mark.parametrize(("made", "target"), [(bert, QV), (gpt2, "**.c_attn"), (net, ["fc", "out"])])
def test_promises(made: Any, target: Any, params: dict[str, Any]) -> None:
    check(made(), "miss", params, target)


@pytest.mark.parametrize("variant", ["miss", "bat"])
def test_bypassed_and_training(variant: str) -> None:
    check_bypassed("miss", {"rank": 8, "variant": variant})
    check_training("miss", {"rank": 8, "variant": variant}, QV)


def test_refusals() -> None:
    made = net()
    assert "use rank: 16 or less" in refusal(*made, "miss", {}, "fc")
    assert "width 5 does not divide" in refusal(*made, "miss", {"rank": 4, "variant": "mini", "width": 5}, "fc")
    assert "rank that divides" in refusal(*made, "miss", {"rank": 5, "variant": "bat"}, "fc")
    assert "dropout: 0" in refusal(*made, "miss", {"rank": 8, "variant": "bat", "dropout": 0.1}, "fc")
    assert "Conv2d" in refusal(*made, "miss", {}, "conv")
