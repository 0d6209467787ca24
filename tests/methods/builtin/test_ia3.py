import peft
import pytest
import torch
from published import planned
from torch import nn
from weight_methods import agree, bert, check, check_bypassed, check_training, gpt2, llama, net, refusal

TEXT = {"role": ["attn.k", "attn.v", "mlp.down"]}


def scale(module):
    return {"scale_in": module.ia3_l["default"], "scale_out": module.ia3_l["default"]}


@pytest.mark.parametrize(
    ("made", "target", "feedforward"),
    [
        (bert, ["key", "value", "output.dense"], ["output.dense"]),
        (llama, ["k_proj", "v_proj", "down_proj"], ["down_proj"]),
    ],
)
def test_it_agrees_with_peft(made, target, feedforward):
    names = {"any": [{"path": f"**.{name}"} for name in target]}
    if made is bert:  # PEFT takes attention.output.dense for a feed-forward, too
        names = {"path": ["**.key", "**.value", "**.layer.*.output.dense"]}
        target = r".*(key|value|layer\.\d+\.output\.dense)"
        feedforward = r".*layer\.\d+\.output\.dense"
    agree(made(), "ia3", {}, names, peft.IA3Config(target_modules=target, feedforward_modules=feedforward), scale)


def test_it_agrees_with_peft_on_conv1d():
    config = peft.IA3Config(
        target_modules=["c_attn", "mlp.c_proj"], feedforward_modules=["mlp.c_proj"], fan_in_fan_out=True
    )
    agree(gpt2(), "ia3", {}, {"role": ["attn.qkv", "mlp.down"]}, config, scale)


@pytest.mark.parametrize("position", ["after", "before"])
def test_it_agrees_with_peft_on_convolutions(position):
    names = ["conv", "grouped"]
    config = peft.IA3Config(target_modules=names, feedforward_modules=names if position == "before" else [])
    agree(net(), "ia3", {"position": position}, {"path": names}, config, scale)


def test_it_keeps_its_promises():
    check(bert(), "ia3", {}, TEXT)
    check(gpt2(), "ia3", {}, {"role": ["attn.qkv", "mlp.down"]})
    check(net(), "ia3", {}, {"path": ["fc", "conv", "grouped", "emb", "conv1"]})
    check(net(), "ia3", {"position": "before"}, {"path": ["fc", "conv", "grouped", "conv1"]})
    check_bypassed("ia3", {})
    check_training("ia3", {}, TEXT, rate=0.2)


def test_inputs_are_scaled_where_the_role_says_so():
    plan = planned(bert()[0], {"method": "ia3"})
    names = {site.fqn.rpartition("layer.0.")[2]: site.tensors[0] for site in plan.sites if "layer.0." in site.fqn}
    assert {name: (spec.name, spec.shape) for name, spec in names.items()} == {
        "attention.self.key": ("scale_out", (32,)),
        "attention.self.value": ("scale_out", (32,)),
        "output.dense": ("scale_in", (48,)),
    }


def test_refusals():
    assert "LayerNorm" in refusal(*bert(), "ia3", {}, {"role": "norm"})
    assert "ids" in refusal(*net(), "ia3", {"position": "before"}, "emb")
    transposed = nn.Sequential(nn.ConvTranspose1d(3, 3, 2))
    assert "transposed" in refusal(transposed, (torch.ones(1, 3, 4),), "ia3", {}, "0")
