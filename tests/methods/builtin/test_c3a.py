from __future__ import annotations

from typing import Any

import peft
import pytest
import torch
from weight_methods import agree, bert, check, check_bypassed, check_training, compiled, gpt2, llama, net, refusal

from deltaspec.methods.builtin.c3a import _convolve

QV = ["**.query", "**.value"]


@pytest.mark.parametrize(
    ("made", "target", "modules", "size"),
    [
        (bert, QV, ["query", "value"], 16),
        (llama, ["**.q_proj", "**.down_proj"], ["q_proj", "down_proj"], 4),
        (net, ["fc"], ["fc"], 8),
        (net, ["out"], ["out"], 4),
    ],
)
def test_agrees_with_peft(made: Any, target: Any, modules: list[str], size: int) -> None:
    config = peft.C3AConfig(block_size=size, target_modules=modules)
    # Through several sites PEFT's gradients are wrong: its hand-written backward fails gradcheck for the input.
    params, gradients = {"block_size": size}, made is net
    kernels = lambda layer: {"kernels": layer.c3a_kernel["default"]}  # noqa: E731
    agree(made(), "c3a", params, target, config, kernels, std=1.0, gradients=gradients)


def test_gradients() -> None:
    x = torch.randn(5, 16, dtype=torch.float64, requires_grad=True)
    kernels = torch.randn(3, 2, 8, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(_convolve, (x, kernels))


def test_blocks_are_circulant() -> None:
    c = compiled(*net(), "c3a", {"block_size": 8}, "fc")
    kernels = c.deltas["d"].tensor("fc.kernels").detach()
    change = (c.merge("d").fc.weight - c.backbone.fc.weight).detach() * 16
    for i in range(3):
        for j in range(2):
            block = change[8 * i : 8 * i + 8, 8 * j : 8 * j + 8]
            expected = torch.stack([kernels[i, j].roll(k) for k in range(8)])
            torch.testing.assert_close(block, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(("made", "target"), [(bert, QV), (gpt2, "**.c_attn"), (net, ["fc", "out"])])
def test_promises(made: Any, target: Any) -> None:
    check(made(), "c3a", {"block_size": 8}, target, identity=False, std=1.0)
    check(made(), "c3a", {"block_size": 8, "init": "zeros"}, target, std=1.0)


@pytest.mark.parametrize(("init", "spread"), [("xavier_uniform", 0.306), ("kaiming_uniform", 0.177), ("normal", 3.0)])
def test_starts(init: str, spread: float) -> None:
    c = compiled(*bert(), "c3a", {"block_size": 2, "init": init}, QV)
    kernels = c.deltas["d"].tensor("encoder.layer.0.attention.self.query.kernels")
    assert spread * 0.8 < kernels.abs().max().item() < spread * (1.01 if "uniform" in init else 1.6)


def test_bypassed_and_training() -> None:
    check_bypassed("c3a", {"block_size": 4, "init": "zeros"})
    check_training("c3a", {"block_size": 8}, QV, rate=0.1)


def test_refusals() -> None:
    text = refusal(*net(), "c3a", {}, "fc")
    assert "does not divide the widths 16 (in) and 24 (out)" in text and "use block_size: 8" in text
    assert "Conv2d" in refusal(*net(), "c3a", {}, "conv")
