from __future__ import annotations

from typing import Any

import peft
import pytest
import torch
from peft.tuners.boft.layer import BOFTLayer
from weight_methods import agree, bert, check, check_bypassed, check_training, compiled, gpt2, llama, net, refusal, stir

from deltaspec.methods.builtin.boft import butterfly, turn

QV = ["**.query", "**.value"]


def tensors(layer: Any) -> dict[str, Any]:
    return {"rotation": layer.boft_R["default"], "output_scale": (layer.boft_s["default"], lambda s: s.flatten())}


@pytest.mark.parametrize(
    ("made", "target", "modules"),
    [
        (bert, QV, ["query", "value"]),
        (llama, ["**.q_proj", "**.down_proj"], ["q_proj", "down_proj"]),
        (net, ["fc", "out"], ["fc", "out"]),
    ],
)
def test_agrees_with_peft(made: Any, target: Any, modules: list[str]) -> None:
    config = peft.BOFTConfig(boft_block_size=4, target_modules=modules)
    agree(made(), "boft", {"block_size": 4}, target, config, tensors, std=0.3)


def test_convolution_agrees_with_peft() -> None:
    config = peft.BOFTConfig(boft_block_size=4, target_modules=["conv"])
    agree(net(), "boft", {"block_size": 4}, "conv", config, tensors, std=0.3)


@pytest.mark.parametrize(("width", "size", "factors"), [(16, 4, 2), (16, 2, 4), (24, 4, 2), (32, 4, 4)])
def test_butterfly_is_the_product_of_permuted_block_diagonals(width: int, size: int, factors: int) -> None:
    # PEFT builds these with a CUDA extension only; here its permutations and formula, written out.
    blocks = width // size
    rotation = torch.randn(factors, blocks, size, size, generator=torch.Generator().manual_seed(0))
    layer = BOFTLayer.__new__(BOFTLayer)
    product = torch.eye(width)
    for index in range(factors):
        order = layer.block_butterfly_perm(width, blocks // 2**index, size // 2, factors - 1)
        assert order.tolist() == butterfly(width, size << index, size // 2)
        p = layer.perm2mat(order)
        product = p @ torch.block_diag(*layer.cayley_batch(rotation[index])) @ p.t() @ product
    x = torch.randn(3, width)
    torch.testing.assert_close(turn(x, rotation), x @ product, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(turn(turn(x, rotation), rotation, inverse=True), x, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("made", "target", "factors"),
    [(bert, QV, 1), (bert, QV, 3), (gpt2, "**.c_attn", 2), (net, "conv", 1), (net, "grouped", 1), (net, "conv1", 3)],
)
def test_promises(made: Any, target: Any, factors: int) -> None:
    check(made(), "boft", {"block_size": 4, "factors": factors}, target)


def test_bypassed_and_training() -> None:
    check_bypassed("boft", {"factors": 2})
    check_training("boft", {"factors": 2}, QV)


def test_only_scales_change_the_length_of_neurons() -> None:
    model, inputs = net()
    c = compiled(model, inputs, "boft", {"factors": 2}, "fc")
    stir(c, 0.5)
    norms = c.deltas["d"].tensor("fc.output_scale").detach().abs() * model.fc.weight.norm(dim=1)
    torch.testing.assert_close(c.merge("d").fc.weight.norm(dim=1), norms, atol=1e-5, rtol=1e-5)


def test_refusals() -> None:
    assert "use block_size: 4" in refusal(*net(), "boft", {"block_size": 5}, "fc")
    assert "use factors: 3" in refusal(*net(), "boft", {"block_size": 4, "factors": 4}, "fc")
    assert "even block_size" in refusal(*net(), "boft", {"block_size": 3, "factors": 2}, "out")
    assert "Embedding" in refusal(*net(), "boft", {}, "emb")
