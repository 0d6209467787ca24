"""Methods that PEFT has as types of their own, written as these types: PEFT computes the same with them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from as_peft import same_in_peft, stirred
from beside_peft import moved, saved
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig

import deltaspec

IDS = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6]])
QV = {"role": ["attn.q", "attn.v"]}
HEAD = {"name": "h", "method": "full", "target": {"role": "head"}}
BIASES = {"name": "b", "method": "bitfit", "target": {"role": ["attn.q", "attn.k"]}}
UNEVEN = {"match": {"role": "attn.v"}}


@pytest.fixture(scope="module")
def llama() -> Any:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    return AutoModelForCausalLM.from_config(LlamaConfig(**sizes, vocab_size=30, attention_bias=True)).eval()


@pytest.fixture(scope="module")
def gpt2() -> Any:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=30)).eval()


def logits(model: Any) -> Tensor:
    found: Tensor = model(input_ids=IDS).logits
    return found


def one(method: str, target: Any = QV, other: dict[str, Any] | None = None, **params: Any) -> dict[str, Any]:
    more = {"overrides": [{**UNEVEN, "params": other}]} if other else {}
    return {"name": "a", "method": method, "params": params, "target": target, **more}


@pytest.mark.parametrize(
    ("kind", "deltas"),
    [
        ("ADALORA", [one("adalora", initial_rank=4, rank=2)]),
        ("BOFT", [one("boft", block_size=4)]),
        ("C3A", [one("c3a", other={"block_size": 8}, block_size=4), HEAD]),
        ("DELORA", [one("delora", other={"rank": 3}, rank=2, init="zeros")]),
        ("LORA", [one("delora", rank=2)]),
        ("FOURIERFT", [one("fourierft", other={"frequencies": 30}, frequencies=20)]),
        ("HIRA", [one("hira", other={"rank": 2}, rank=3), HEAD]),
        ("HRA", [one("hra", rank=2), BIASES]),
        ("IA3", [one("ia3", {"role": ["attn.k", "attn.v", "mlp.down"]})]),
        ("IA3", [one("ia3", {"path": ["**.v_proj", "**.0.self_attn.q_proj"]}, {"position": "before"})]),
        ("LOHA", [one("loha", other={"rank": 3, "alpha": 5}, rank=2)]),
        ("LOKR", [one("lokr", other={"rank": 3, "alpha": 5}, rank=2, factor=2)]),
        ("MISS", [one("miss", rank=4, variant="bat")]),
        ("MISS", [one("miss", rank=4, variant="mini", width=2)]),
        ("OFT", [one("oft", block_size=4, transform="cayley", shared_blocks=True), HEAD]),
        ("OFT", [one("oft", block_size=4)]),
        ("ROAD", [one("road", group_size=4, variant=2)]),
        ("ROAD", [HEAD, one("road", group_size=2, target={"role": ["head", "attn.q"]})]),
        ("VERA", [one("vera", rank=5), BIASES]),
        ("LORA", [one("vera", {"role": ["attn.q", "mlp.up"]}, rank=5)]),
        ("LORA", [one("vera", rank=5), one("lora", rank=2) | {"name": "c"}]),
        ("LN_TUNING", [one("norm", {"role": "norm"}, train="weight"), HEAD]),
        ("TRAINABLE_TOKENS", [one("trainable_tokens", "model.embed_tokens", token_ids=[3, 1])]),
    ],
    ids=lambda value: value if isinstance(value, str) else f"{value[0]['method']}{len(str(value))}",
)
def test_peft_computes_the_same(llama: Any, kind: str, deltas: list[Any], tmp_path: Path) -> None:
    theirs = same_in_peft(stirred(llama, *deltas), llama, tmp_path, logits)
    assert theirs.peft_config["default"].peft_type == kind


@pytest.mark.parametrize(
    ("method", "params"),
    [("adalora", {"initial_rank": 3, "rank": 2}), ("fourierft", {"frequencies": 20}), ("hira", {"rank": 2}),
     ("ia3", {}), ("vera", {"rank": 3}), ("lora", {"use_dora": True, "rank": 2})],
    ids=str,
)  # fmt: skip
def test_transposed_weights(gpt2: Any, method: str, params: dict[str, Any], tmp_path: Path) -> None:
    same_in_peft(stirred(gpt2, one(method, {"role": ["attn.qkv", "mlp.down"]}, **params)), gpt2, tmp_path, logits)


@pytest.mark.parametrize(
    "config",
    [
        peft.LoHaConfig(
            r=2, target_modules=["q_proj", "v_proj"], rank_pattern={"v_proj": 3}, modules_to_save=["lm_head"]
        ),
        peft.LoKrConfig(r=2, target_modules=["q_proj", "1.mlp.up_proj"], decompose_both=True),
        peft.OFTConfig(oft_block_size=4, target_modules="all-linear", bias="oft_only"),
        peft.IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
        peft.VeraConfig(r=4, target_modules=["q_proj", "up_proj"], save_projection=True),
        peft.HRAConfig(r=2, target_modules=["q_proj"], apply_GS=True, bias="all", modules_to_save=["k_proj"]),
    ],
    ids=lambda config: config.peft_type,
)
def test_what_peft_saved_goes_through_unchanged(llama: Any, config: Any, tmp_path: Path) -> None:
    source = saved(moved(llama, config), tmp_path / "in")
    same_in_peft(deltaspec.restore(llama, source), llama, tmp_path / "out", logits)
    before, after = (load_file(folder / "adapter_model.safetensors") for folder in (source, tmp_path / "out"))
    assert all(torch.equal(value, before[key]) for key, value in after.items() if key in before)
    assert before.keys() == after.keys() or config.bias == "oft_only"  # which comes out as all biases
    assert before.keys() <= after.keys()


@pytest.mark.parametrize(
    ("deltas", "strength", "reason"),
    [
        ([one("oft", block_size=4)], 0.5, "strength 0.5 has no place in PEFT's OFT"),
        ([one("oft", block_size=4), one("hra", rank=2) | {"name": "c", "target": {"role": "mlp.up"}}], 1, "of several"),
        ([one("hra", rank=2, other={"rank": 4})], 1, "has one r for all modules"),
        ([one("miss", rank=4), one("miss", rank=4) | {"name": "c"}], 1, "several deltas"),
        ([one("ia3"), BIASES], 1, "PEFT's IA3 has no option for biases"),
        (
            [one("hra", rank=2), {"name": "t", "method": "trainable_tokens", "params": {"token_ids": [1]}}],
            1,
            "HRA has no trainable_token_indices",
        ),
    ],
    ids=str,
)
def test_refused(llama: Any, deltas: list[Any], strength: float, reason: str, tmp_path: Path) -> None:
    compiled = stirred(llama, *deltas)
    compiled.only(
        dict.fromkeys(compiled.attached, strength) if strength != 1 else dict.fromkeys(compiled.attached, 1.0)
    )
    with pytest.raises(deltaspec.DeltaSpecError, match=f"DS560.*({reason})"):
        compiled.save_as("peft", tmp_path / "out")
    assert not (tmp_path / "out").exists()
