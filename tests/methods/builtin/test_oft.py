from __future__ import annotations

from typing import Any

import peft
import pytest
import torch
from torch import nn
from weight_methods import agree, bert, check, check_bypassed, check_training, compiled, gpt2, llama, net, refusal, stir

QV = ["**.query", "**.value"]


def tensors(layer: Any) -> dict[str, Any]:
    held = layer.oft_R if "default" in layer.oft_R else layer.oft_embedding_R
    return {"rotation": held["default"].weight}


@pytest.mark.parametrize(
    ("params", "options"),
    [
        ({}, {}),
        ({"terms": 8}, {"num_cayley_neumann_terms": 8}),
        ({"transform": "cayley"}, {"use_cayley_neumann": False}),
        ({"shared_blocks": True}, {"block_share": True}),
        ({"constraint": 0.3, "shared_blocks": True}, {"coft": True, "eps": 0.3, "block_share": True}),
    ],
    ids=str,
)
@pytest.mark.parametrize(
    ("made", "target", "modules"),
    [
        (bert, QV, ["query", "value"]),
        (llama, ["**.q_proj", "**.down_proj"], ["q_proj", "down_proj"]),
        (net, ["fc", "out"], ["fc", "out"]),
        (net, "emb", ["emb"]),
    ],
)
def test_agrees_with_peft(made: Any, target: Any, modules: list[str], params: Any, options: Any) -> None:
    config = peft.OFTConfig(oft_block_size=8, target_modules=modules, **options)
    agree(made(), "oft", {"block_size": 8, **params}, target, config, tensors)


def test_convolution_is_peft_merged_weight() -> None:
    # PEFT's forward of a convolution sums overlapping patches, which is not what it merges; the merged weight is meant.
    model, inputs = net()
    c = compiled(model, inputs, "oft", {"block_size": 12}, "conv")
    stir(c)
    other = peft.get_peft_model(net()[0], peft.OFTConfig(oft_block_size=12, target_modules=["conv"]))
    layer = other.base_model.model.conv
    layer.oft_R["default"].weight.data.copy_(c.deltas["d"].tensor("conv.rotation"))
    layer.merge()
    torch.testing.assert_close(c.merge("d").conv.weight, layer.get_base_layer().weight, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(c(**inputs), c.merge("d")(**inputs), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("made", "target"), [(bert, QV), (gpt2, "**.c_attn"), (net, "emb"), (net, "conv"), (net, "grouped"), (net, "conv1")]
)
def test_promises(made: Any, target: Any) -> None:
    check(made(), "oft", {"block_size": 4}, target)
    check(made(), "oft", {"block_size": 4, "transform": "cayley"}, target)


def test_bypassed_and_training() -> None:
    check_bypassed("oft", {"block_size": 8})
    check_training("oft", {"block_size": 8}, QV)


def test_cayley_keeps_the_angles_between_neurons() -> None:
    model, inputs = net()
    c = compiled(model, inputs, "oft", {"block_size": 8, "transform": "cayley"}, "fc")
    stir(c, 1.0)
    weight, turned = model.fc.weight, c.merge("d").fc.weight
    assert not torch.allclose(weight, turned, atol=0.1)
    torch.testing.assert_close(turned @ turned.t(), weight @ weight.t(), atol=1e-5, rtol=1e-4)


def test_refusals() -> None:
    text = refusal(*net(), "oft", {"block_size": 7}, "fc")
    assert "does not divide the width 16" in text and "use block_size: 8" in text
    assert "use block_size: 16" in refusal(*net(), "oft", {"block_size": 32}, "fc")
    assert "LayerNorm" in refusal(*bert(), "oft", {}, "**.LayerNorm")


@pytest.mark.parametrize(("width", "way"), [(13, "use block_size: 13"), (1, "leave this module out")])
def test_what_is_suggested_is_allowed(width: int, way: str) -> None:
    layer, x = nn.Sequential(nn.Linear(width, 4)), torch.randn(2, width)
    for method in ("oft", "boft"):
        assert way in refusal(layer, x, method, {"block_size": 2}, "0")


def test_patches_and_dropout_are_for_what_they_are_for() -> None:
    assert "leave patches out" in refusal(*net(), "oft", {"block_size": 4, "patches": [3, 3]}, "fc")
    assert "of that kernel" in refusal(*net(), "oft", {"block_size": 4, "patches": [1, 1]}, "conv")
    assert "block_dropout: 0" in refusal(*net(), "oft", {"block_size": 4, "block_dropout": 0.1}, "conv")
