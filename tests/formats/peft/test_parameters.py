"""LoRA of PEFT on parameters, on packed attention and on convolutions, and starts taken out of the base's weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from as_peft import same_in_peft, stirred
from beside_peft import as_theirs, moved, saved
from peft_bases import base, run
from safetensors.torch import load_file, save_file

import deltaspec

EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
QKV = {"target_modules": ["q_proj"], "r": 3}


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("mixtral", {"target_parameters": EXPERTS, "r": 2, "lora_alpha": 3}),
        ("mixtral", {"target_modules": ["q_proj"], "target_parameters": EXPERTS[1:], "rank_pattern": {"down_proj": 3}}),
        ("mixtral", {"target_parameters": ["gate.weight", "q_proj.weight", "embed_tokens.weight"], "r": 2}),
        ("gptoss", {"target_parameters": EXPERTS, "r": 2, "use_rslora": True}),
        ("gpt2", {"target_parameters": ["c_attn.weight"], "r": 2}),
        ("attention", {"target_modules": ["fc"], "target_parameters": ["free.weight"], "r": 2}),
        ("llama", {**QKV, "init_lora_weights": "pissa", "alpha_pattern": {r"layers\.1.*": 5}}),
        ("gpt2", {"target_modules": ["c_attn"], "r": 3, "init_lora_weights": "pissa"}),
        ("llama", {**QKV, "init_lora_weights": "olora"}),
        ("llama", {**QKV, "init_lora_weights": "pissa", "use_dora": True}),
        ("convolutions", {"target_modules": ["conv", "conv1", "conv3", "fc"], "r": 2, "use_dora": True}),
        ("convolutions", {"target_modules": ["conv", "conv3"], "r": 2, "lora_bias": True}),
        ("convolutions", {"target_modules": ["conv", "conv1"], "r": 2, "use_dora": True, "bias": "lora_only"}),
        ("convolutions", {"target_modules": ["conv3", "fc"], "r": 2, "use_dora": True, "bias": "all"}),
        ("attention", {"target_modules": ["out_proj", "fc"], "r": 2}),
    ],
    ids=str,
)
def test_options(name: str, options: dict[str, Any], tmp_path: Path) -> None:
    config = peft.LoraConfig(**{"target_modules": [], **options})
    as_theirs(base(name), moved(base(name), config), tmp_path / "french", run(name))


def test_parameters_that_are_cut_and_those_that_no_model_has(tmp_path: Path) -> None:
    targets = ["experts.gate_up_proj", "experts.nowhere"]
    made = moved(base("mixtral"), peft.LoraConfig(target_modules=["q_proj"], target_parameters=targets, r=2))
    as_theirs(base("mixtral"), made, tmp_path / "french", run("mixtral"))
    file = tmp_path / "french" / "adapter_model.safetensors"
    save_file({key: value for key, value in load_file(file).items() if "layers.1.mlp" not in key}, file)
    with pytest.raises(deltaspec.DeltaSpecError, match=r"has no factors for model.layers.1.mlp.experts.gate_up_proj"):
        deltaspec.restore(base("mixtral"), tmp_path / "french")


def test_packed_attention_whose_output_is_changed_twice(tmp_path: Path) -> None:
    config = peft.LoraConfig(target_modules=["mha", "fc"], r=2, lora_alpha=3, lora_dropout=0.1)
    made = moved(base("attention"), config)
    compiled = as_theirs(base("attention"), made, tmp_path / "french", run("attention"), gradients=False)
    found = {site.fqn: (site.params.alpha, site.params.dropout) for site in compiled.plan["french"].sites}
    assert found == {"mha.in_proj_weight": (3, 0), "mha.out_proj": (6, 0), "fc": (3, 0.1)}


@pytest.mark.parametrize("more", [{}, {"lora_bias": True, "use_rslora": True}], ids=str)
def test_grouped_convolutions_whose_a_sees_all_channels(more: dict[str, Any], tmp_path: Path) -> None:
    made = moved(base("convolutions"), peft.LoraConfig(target_modules=["grouped", "conv1"], r=4, **more))
    compiled = as_theirs(base("convolutions"), made, tmp_path / "french", run("convolutions"))
    assert {s.fqn: s.params.channels for s in compiled.plan["french"].sites} == {"grouped": "all", "conv1": "group"}
    same_in_peft(compiled, base("convolutions"), tmp_path / "again", run("convolutions"))


def test_what_sees_its_own_groups_comes_back_so(tmp_path: Path) -> None:
    made = {"name": "d", "method": "lora", "params": {"rank": 4}, "target": {"path": "grouped"}}
    same_in_peft(stirred(base("convolutions"), made), base("convolutions"), tmp_path, run("convolutions"))
    back = deltaspec.restore(base("convolutions"), tmp_path)
    assert back.plan.deltas[0].sites[0].params.channels == "group"
    torch.testing.assert_close(run("convolutions")(back.merge()), run("convolutions")(back))


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("convolutions", {"target_modules": ["grouped"], "r": 2, "use_dora": True}, "use_dora on grouped"),
        ("attention", {"target_modules": ["mha"], "lora_bias": True}, "lora_bias on mha"),
    ],
)
def test_what_has_no_form_is_refused(name: str, options: dict[str, Any], message: str, tmp_path: Path) -> None:
    folder = saved(moved(base(name), peft.LoraConfig(**options)), tmp_path)
    with pytest.raises(deltaspec.DeltaSpecError, match=message):
        deltaspec.restore(base(name), folder)


def test_where_torchs_fast_path_passes_peft_by(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.TransformerEncoderLayer(8, 2, 12, dropout=0.0, batch_first=True)).eval()
    x = torch.randn(2, 3, 8)
    made = moved(net, peft.LoraConfig(target_modules=["linear1", "linear2"], r=2))
    compiled = deltaspec.restore(net, saved(made, tmp_path / "french"))
    assert "torch's fast path reads the weights in 0 by itself" in " ".join(str(compiled.plan).split())
    assert (made(x) - net(x)).abs().max() < 1e-5  # PEFT in evaluation
    assert (made.train()(x) - net(x)).abs().max() > 1e-3
    assert (made(x) - compiled.train()(x)).abs().max() < 1e-5
    assert (made(x) - compiled.eval()(x)).abs().max() < 1e-5
