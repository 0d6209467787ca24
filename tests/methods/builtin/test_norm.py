import copy

import peft
import pytest
import torch
from published import planned
from torch import nn
from transformers import Gemma3ForCausalLM, Gemma3TextConfig, LlamaConfig, LlamaForCausalLM
from weight_methods import agree, bert, check_training, compiled, gpt2, llama, refusal, run, stir


def own(module):
    return dict(module.ln_tuning_layers["default"].named_parameters())


def gemma():
    torch.manual_seed(0)
    config = Gemma3TextConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=8,
        intermediate_size=48, vocab_size=50, sliding_window=8,
    )  # fmt: skip
    return Gemma3ForCausalLM(config).eval(), {"input_ids": torch.arange(12).reshape(2, 6)}


@pytest.mark.parametrize(
    ("made", "modules"),
    [
        (bert, r".*LayerNorm"),
        (gpt2, ["ln_1", "ln_2", "ln_f"]),
        (llama, ["input_layernorm", "post_attention_layernorm", "norm"]),
        (gemma, ["input_layernorm", "post_attention_layernorm", "q_norm", "k_norm"]),
    ],
)
def test_it_agrees_with_peft(made, modules):
    target = {"regex": modules} if isinstance(modules, str) else {"path": [f"**.{name}" for name in modules]}
    agree(made(), "norm", {}, target, peft.LNTuningConfig(target_modules=modules), own)


@pytest.mark.parametrize("train", ["both", "weight", "bias"])
def test_copies_stand_in_and_the_norms_stay(train):
    model, inputs = bert()
    before, plain = copy.deepcopy(model.state_dict()), run(model, inputs)
    c = compiled(model, inputs, "norm", {"train": train}, {"role": "norm"})
    assert torch.equal(run(c, inputs), plain)
    stir(c)
    changed = run(c, inputs)
    assert not torch.allclose(changed, plain, atol=1e-3)
    torch.testing.assert_close(run(c.merge("d"), inputs), changed)
    with c.detached():
        assert torch.equal(run(c, inputs), plain)
    assert {spec.name for site in c.plan.sites for spec in site.tensors} == (
        {"weight", "bias"} if train == "both" else {train}
    )
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_it_learns():
    check_training("norm", {}, {"role": "norm"})


def test_batch_statistics_stay_the_backbones():
    model, x = nn.Sequential(nn.Conv1d(2, 4, 1), nn.BatchNorm1d(4)), torch.randn(3, 2, 5)
    c = compiled(model, x, "norm", {}, "1").train()
    c(x).sum().backward()
    assert torch.equal(c.backbone[1].running_mean, torch.zeros(4))
    assert all(p.grad is not None for p in c.trainable_parameters())


def test_count_on_seven_billion_parameters():
    with torch.device("meta"):
        model = LlamaForCausalLM(
            LlamaConfig(hidden_size=4096, num_hidden_layers=32, num_attention_heads=32, intermediate_size=11008)
        )
    assert planned(model, {"method": "norm"}).trainable == (2 * 32 + 1) * 4096


def test_refusals():
    assert "Linear" in refusal(*bert(), "norm", {}, {"role": "attn.q"})
    assert "no bias to train" in refusal(*llama(), "norm", {"train": "bias"}, {"role": "norm"})
    plain = nn.Sequential(nn.LayerNorm(4, elementwise_affine=False))
    assert "no weight or bias" in refusal(plain, (torch.ones(1, 4),), "norm", {}, "0")
