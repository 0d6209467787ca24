"""Deltas on parameters written as PEFT's `target_parameters`: experts in stacks, single matrices, renamed layers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from as_peft import same_in_peft, stirred
from beside_peft import moved, saved
from mixtures import IDS, SIZES, gpt_oss, mixtral, qwen3_moe
from peft_bases import base, run
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

import deltaspec

EXPERTS = {"path": "**.experts", "parameter": ["gate_up_proj", "down_proj"]}
DOWN = {"path": "**.experts", "parameter": "down_proj"}
HEAD = {"name": "h", "method": "full", "target": {"path": "lm_head"}}
MAKERS = {"mixtral": mixtral, "gpt_oss": gpt_oss, "qwen3_moe": qwen3_moe}


def dense() -> nn.Module:
    """A mixture whose first layer has a plain feed-forward, named as the experts of older transformers were."""
    sizes = {"intermediate_size": 24, "moe_intermediate_size": 12, "num_experts": 4, "num_experts_per_tok": 2}
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(**SIZES, **sizes, mlp_only_layers=[0]))


@pytest.fixture(scope="module")
def models() -> dict[str, Any]:
    torch.manual_seed(0)
    made = {name: make().eval() for name, make in (*MAKERS.items(), ("dense", dense))}
    for model in made.values():
        for parameter in model.parameters():
            nn.init.normal_(parameter, std=0.2)
    return made


def logits(model: Any) -> Tensor:
    found: Tensor = model(input_ids=IDS).logits
    return found


def one(target: Any, name: str = "a", method: str = "lora", over: Any = None, **params: Any) -> dict[str, Any]:
    more = {} if over is None else {"overrides": [over]}
    return {"name": name, "method": method, "params": params, "target": target, **more}


@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.parametrize(
    "deltas",
    [
        [one(EXPERTS, rank=2, over={"match": DOWN, "params": {"rank": 3, "alpha": 5}})],
        [one(DOWN, rank=3, scaling="rslora"), one("**.q_proj", "c", rank=2, dropout=0.1), HEAD],
        [one(EXPERTS, method="vera", rank=3)],
        [one(DOWN, method="delora", rank=2), one("**.v_proj", "c", rank=2, init="pissa")],
        [one(DOWN, rank=2, init="orthogonal")],
    ],
    ids=lambda deltas: "-".join(f"{d['method']}{len(str(d))}" for d in deltas),
)
def test_experts(models: dict[str, Any], name: str, deltas: list[Any], tmp_path: Path) -> None:
    same_in_peft(stirred(models[name], *deltas), models[name], tmp_path, logits)


def test_several_at_strengths_with_one_rank(models: dict[str, Any], tmp_path: Path) -> None:
    model = models["gpt_oss"]
    compiled = stirred(model, one(EXPERTS, rank=2), one(DOWN, "c", rank=3), one("**.q_proj", "d", rank=1))
    compiled.only({"a": 0.5, "c": -1.5, "d": 2})
    theirs = same_in_peft(compiled, model, tmp_path, logits, uniform=True)
    assert theirs.peft_config["default"].rank_pattern == {}


def test_routers_and_other_matrices(models: dict[str, Any], tmp_path: Path) -> None:
    router = {"type": "MixtralTopKRouter", "parameter": "weight"}
    same_in_peft(stirred(models["mixtral"], one(router, rank=2)), models["mixtral"], tmp_path / "a", logits)
    free = one({"path": "free", "parameter": "weight"}, rank=2)
    packed = one({"path": "mha", "parameter": "in_proj_weight"}, "c", rank=2)
    model = base("attention")
    same_in_peft(stirred(model, free, packed), model, tmp_path / "b", run("attention"))


def test_layers_that_peft_takes_for_experts(models: dict[str, Any], tmp_path: Path) -> None:
    delta = one({"role": ["mlp.up", "mlp.down", "attn.q"]}, rank=2)
    theirs = same_in_peft(stirred(models["dense"], delta), models["dense"], tmp_path / "a", logits)
    assert theirs.peft_config["default"].target_modules == {"q_proj"}
    with pytest.raises(deltaspec.DeltaSpecError, match=r"DS560.*takes this name for that of experts"):
        stirred(models["dense"], {**delta, "params": {"use_dora": True}}).save_as("peft", tmp_path / "b")


def test_an_approximation_of_full_rank_is_exact(models: dict[str, Any], tmp_path: Path) -> None:
    model = models["gpt_oss"]
    compiled = stirred(model, one(EXPERTS, method="loha", rank=2), one("**.q_proj", "c", "oft", block_size=4))
    same_in_peft(compiled, model, tmp_path, logits, 1e-4, approximate=24)
    errors = compiled.save_as("peft", tmp_path / "rough", approximate=1)
    assert any(name.endswith("experts.down_proj") and 0 < error < 1 for name, error in errors.items())


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
def test_what_peft_saved_goes_through_unchanged(models: dict[str, Any], name: str, tmp_path: Path) -> None:
    options = {"target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"], "r": 2, "use_rslora": True}
    config = peft.LoraConfig(target_modules=["q_proj"], **options, rank_pattern={"experts.down_proj": 3})
    source = saved(moved(models[name], config), tmp_path / "in")
    same_in_peft(deltaspec.restore(models[name], source), models[name], tmp_path / "out", logits)
    before, after = (load_file(folder / "adapter_model.safetensors") for folder in (source, tmp_path / "out"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)


@pytest.mark.parametrize(
    ("deltas", "reason"),
    [
        ([one(DOWN, rank=2, use_dora=True)], "have no DoRA"),
        ([one(DOWN, rank=2), one("**.q_proj", "c", rank=2, use_dora=True)], "do not go with DoRA"),
        ([one(DOWN, method="hira", rank=2)], "of LoRA alone"),
    ],
    ids=["dora", "beside", "hira"],
)
def test_refused(models: dict[str, Any], deltas: list[Any], reason: str, tmp_path: Path) -> None:
    with pytest.raises(deltaspec.DeltaSpecError, match=f"DS560.*{reason}"):
        stirred(models["mixtral"], *deltas).save_as("peft", tmp_path / "out")
    assert not (tmp_path / "out").exists()
