from __future__ import annotations

from typing import Any

import peft
import pytest
from peft.tuners.lokr.layer import factorization
from weight_methods import agree, bert, check, check_bypassed, check_training, compiled, gpt2, llama, net, refusal

from deltaspec.methods.builtin.lokr import split

QV = ["**.query", "**.value"]


def tensors(layer: Any) -> dict[str, Any]:
    theirs = {
        "small": layer.lokr_w1,
        "small_up": layer.lokr_w1_a,
        "small_down": layer.lokr_w1_b,
        "large": layer.lokr_w2,
        "large_up": layer.lokr_w2_a,
        "large_down": layer.lokr_w2_b,
        "large_core": layer.lokr_t2,
    }
    found: dict[str, Any] = {name: held["default"] for name, held in theirs.items() if "default" in held}
    if "large_core" in found:
        found["large_up"] = (found["large_up"], lambda w: w.t())
    return found


@pytest.mark.parametrize(
    ("params", "options"),
    [
        ({}, {}),
        ({"factor": 4}, {"decompose_factor": 4}),
        ({"decompose_both": True}, {"decompose_both": True}),
        ({"tucker": True}, {"use_effective_conv2d": True}),
    ],
    ids=str,
)
@pytest.mark.parametrize(
    ("made", "target", "modules"),
    [
        (bert, QV, ["query", "value"]),
        (llama, "**.down_proj", ["down_proj"]),
        (net, ["fc", "out"], ["fc", "out"]),
        (net, "conv", ["conv"]),
        (net, "grouped", ["grouped"]),
    ],
)
def test_agrees_with_peft(made: Any, target: Any, modules: list[str], params: Any, options: Any) -> None:
    config = peft.LoKrConfig(r=1, alpha=2, target_modules=modules, **options)
    agree(made(), "lokr", {"rank": 1, "alpha": 2.0, **params}, target, config, tensors, std=0.3)


def test_one_dimensional_convolution_agrees_with_peft() -> None:
    # Without a core: PEFT's own form with one fails in torch.kron.
    config = peft.LoKrConfig(r=1, alpha=2, target_modules=["conv1"])
    agree(net(), "lokr", {"rank": 1, "alpha": 2.0, "tucker": False}, "conv1", config, tensors, std=0.3)


@pytest.mark.parametrize("factor", [None, 4, 8])
def test_split_agrees_with_peft(factor: int | None) -> None:
    for width in [*range(1, 400), 768, 1024, 3072, 4096, 11008, 50257]:
        assert split(width, factor) == factorization(width, -1 if factor is None else factor), width


@pytest.mark.parametrize(
    "params", [{}, {"init": "zero_large", "factor": 4}, {"rank": 1, "decompose_both": True, "tucker": True}], ids=str
)
@pytest.mark.parametrize(
    ("made", "target"), [(bert, QV), (gpt2, "**.c_attn"), (net, "emb"), (net, "conv"), (net, "grouped"), (net, "conv1")]
)
def test_promises(made: Any, target: Any, params: dict[str, Any]) -> None:
    check(made(), "lokr", params, target, std=0.3)


def test_bypassed_and_training() -> None:
    check_bypassed("lokr", {"rank": 2})
    check_training("lokr", {"rank": 2}, QV)


def test_counts() -> None:
    c = compiled(*llama(), "lokr", {"rank": 1}, "**.down_proj")
    assert [t.shape for t in c.plan.sites[0].tensors] == [(4, 6), (8, 1), (1, 8)]  # a weight of [32, 48]


def test_refusals() -> None:
    assert "LayerNorm" in refusal(*bert(), "lokr", {}, "**.LayerNorm")
