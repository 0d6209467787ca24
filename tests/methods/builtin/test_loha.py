from __future__ import annotations

from typing import Any

import peft
import pytest
import torch
from weight_methods import agree, bert, check, check_bypassed, check_training, compiled, gpt2, llama, net, refusal, stir

QV = ["**.query", "**.value"]


def tensors(layer: Any) -> dict[str, Any]:
    if "default" not in layer.hada_t1:
        return {
            "up_1": layer.hada_w1_a["default"],
            "down_1": layer.hada_w1_b["default"],
            "up_2": layer.hada_w2_a["default"],
            "down_2": layer.hada_w2_b["default"],
        }
    return {
        "up_1": (layer.hada_w1_a["default"], lambda w: w.t()),
        "down_1": layer.hada_w1_b["default"],
        "up_2": (layer.hada_w2_a["default"], lambda w: w.t()),
        "down_2": layer.hada_w2_b["default"],
        "core_1": layer.hada_t1["default"],
        "core_2": layer.hada_t2["default"],
    }


@pytest.mark.parametrize("tucker", [False, True])
@pytest.mark.parametrize(
    ("made", "target", "modules"),
    [
        (bert, QV, ["query", "value"]),
        (llama, "**.down_proj", ["down_proj"]),
        (net, ["fc", "out"], ["fc", "out"]),
        (net, "conv", ["conv"]),
        (net, "grouped", ["grouped"]),
        (net, "conv1", ["conv1"]),
    ],
)
def test_agrees_with_peft(made: Any, target: Any, modules: list[str], tucker: bool) -> None:
    config = peft.LoHaConfig(r=4, alpha=6, target_modules=modules, use_effective_conv2d=tucker)
    # PEFT's hand-written backward of the core form takes the second factor's core for the first factor's gradient.
    gradients = not (tucker and modules[0] in ("conv", "grouped", "conv1"))
    params = {"rank": 4, "alpha": 6.0, "tucker": tucker}
    agree(made(), "loha", params, target, config, tensors, std=0.3, gradients=gradients)


def test_gradients_of_the_core_form() -> None:
    model, inputs = net()
    c = compiled(model, inputs, "loha", {"rank": 3, "tucker": True}, "conv")
    c.double()
    stir(c, 0.5)
    inputs = {"ids": inputs["ids"], "image": inputs["image"].double()}
    held = c.deltas["d"]
    c(**inputs).square().sum().backward()
    for name in ("up_1", "down_1", "core_1", "up_2", "down_2", "core_2"):
        parameter = held.tensor(f"conv.{name}")
        way = torch.randn_like(parameter)
        sums = []
        with torch.no_grad():
            for step in (1e-6, -2e-6):
                parameter += step * way
                sums.append(c(**inputs).square().sum())
            parameter += 1e-6 * way
        slope = ((sums[0] - sums[1]) / 2e-6).item()
        assert slope == pytest.approx((parameter.grad * way).sum().item(), rel=1e-4)


@pytest.mark.parametrize("tucker", [False, True])
@pytest.mark.parametrize(
    ("made", "target"), [(bert, QV), (gpt2, "**.c_attn"), (net, "emb"), (net, "conv"), (net, "grouped"), (net, "conv1")]
)
def test_promises(made: Any, target: Any, tucker: bool) -> None:
    check(made(), "loha", {"rank": 4, "alpha": 8.0, "tucker": tucker}, target, std=0.5)


def test_bypassed_and_training() -> None:
    check_bypassed("loha", {"rank": 4, "alpha": 64.0})
    check_training("loha", {"rank": 4}, QV)


def test_refusals() -> None:
    assert "LayerNorm" in refusal(*bert(), "loha", {}, "**.LayerNorm")
