"""Deltas written as PEFT adapters: PEFT computes the same with them, and what has no exact form is refused."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from as_peft import same_in_peft, stirred
from beside_peft import moved, reloaded, saved
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig

import deltaspec

IDS = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6]])
QV = {"role": ["attn.q", "attn.v"]}


@pytest.fixture(scope="module")
def llama() -> Any:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2}
    config = LlamaConfig(**sizes, num_key_value_heads=1, vocab_size=30, attention_bias=True)
    return AutoModelForCausalLM.from_config(config).eval()


@pytest.fixture(scope="module")
def gpt2() -> Any:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=30)).eval()


def logits(model: Any) -> Tensor:
    found: Tensor = model(input_ids=IDS).logits
    return found


def lora(name: str = "a", target: Any = QV, overrides: Any = (), **params: Any) -> dict[str, Any]:
    more = {"overrides": list(overrides)} if overrides else {}
    return {"name": name, "method": "lora", "params": {"rank": 4, **params}, "target": target, **more}


def config_in(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "adapter_config.json").read_bytes())
    return found


HEAD = {"name": "h", "method": "full", "target": {"role": "head"}, "params": {}}
TOKENS = {"name": "t", "method": "trainable_tokens", "params": {"token_ids": [4, 1, 9]}}
BIASES = {"name": "b", "method": "bitfit", "target": {"role": ["attn.q", "attn.k"]}}
UNEVEN = [{"match": {"role": "attn.v"}, "params": {"rank": 2, "alpha": 3}}]


@pytest.mark.parametrize(
    "deltas",
    [
        [lora()],
        [lora(overrides=UNEVEN)],
        [lora(scaling="rslora")],
        [lora(use_dora=True)],
        [lora(use_dora=True, overrides=[{"match": {"role": "attn.v"}, "params": {"use_dora": False}}])],
        [lora(bias=True)],
        [lora(init="pissa")],
        [lora(init="orthogonal"), lora("c", "**.up_proj", rank=3)],
        [lora(target="model.embed_tokens")],
        [lora(), HEAD, TOKENS],
        [lora(), BIASES],
        [BIASES, {"name": "n", "method": "norm"}],
        [{"name": "b", "method": "bitfit", "target": {"role": "mlp.up"}}],
        [HEAD],
        [TOKENS],
    ],
    ids=lambda deltas: "-".join(f"{d['method']}{len(str(d))}" for d in deltas),
)
def test_peft_computes_the_same(llama: Any, deltas: list[Any], tmp_path: Path) -> None:
    same_in_peft(stirred(llama, *deltas), llama, tmp_path, logits)


@pytest.mark.parametrize("strengths", [(1, 1), (0.3, 2), (-1.5, 0.5), (0, 1)], ids=str)
@pytest.mark.parametrize("uniform", [False, True])
def test_deltas_at_strengths_become_one(llama: Any, strengths: Any, uniform: bool, tmp_path: Path) -> None:
    compiled = stirred(llama, lora(overrides=UNEVEN), lora("c", "**.q_proj", rank=3, scaling="rslora"))
    compiled.only(dict(zip("ac", strengths, strict=True)))
    same_in_peft(compiled, llama, tmp_path, logits, uniform=uniform)
    config = config_in(tmp_path)
    assert bool(config["rank_pattern"]) is not uniform
    assert not (uniform and config["alpha_pattern"])


def test_what_is_not_rewritten_keeps_its_bits(llama: Any, tmp_path: Path) -> None:
    compiled = stirred(llama, lora(overrides=UNEVEN))
    theirs = same_in_peft(compiled, llama, tmp_path, logits)
    own = dict(compiled.deltas["a"].tensors())
    written = load_file(tmp_path / "adapter_model.safetensors")
    assert len(written) == len(own)
    for key, value in own.items():
        suffix = key.replace(".down", ".lora_A.weight").replace(".up", ".lora_B.weight")
        if not suffix.endswith("_proj"):
            assert torch.equal(written[f"base_model.model.{suffix}"], value)
    assert theirs.peft_config["default"].rank_pattern == {"v_proj": 2}


def test_what_peft_saved_goes_through_unchanged(llama: Any, tmp_path: Path) -> None:
    options = {"target_modules": ["q_proj", "0.mlp.up_proj"], "r": 4, "rank_pattern": {"q_proj": 2}, "use_rslora": True}
    theirs = moved(llama, peft.LoraConfig(**options, modules_to_save=["lm_head"]))
    source = saved(theirs, tmp_path / "in")
    compiled = deltaspec.restore(llama, source)
    same_in_peft(compiled, llama, tmp_path / "out", logits)
    before, after = (load_file(folder / "adapter_model.safetensors") for folder in (source, tmp_path / "out"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)


@pytest.mark.parametrize("parts", [["q", "v"], ["k"]], ids="-".join)
def test_parts_of_a_fused_projection(gpt2: Any, parts: list[str], tmp_path: Path) -> None:
    theirs = same_in_peft(stirred(gpt2, lora(target={"role": "attn.qkv"}, parts=parts)), gpt2, tmp_path, logits)
    assert theirs.peft_config["default"].r == 4 * len(parts)


class Names(nn.Module):
    """Modules whose names are the ends of others', or mean something in a regular expression."""

    def __init__(self) -> None:
        super().__init__()
        self.q = nn.Linear(8, 8)
        self.inner = nn.ModuleDict({"q": nn.Linear(8, 8), "a+b": nn.Linear(8, 8), "aab": nn.Linear(8, 8)})
        self.conv = nn.Conv2d(4, 4, 3, padding=1, groups=2)
        self.head = nn.Linear(8, 3)
        self.big_head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.inner["aab"](self.inner["a+b"](self.inner["q"](self.q(x))))
        x = self.conv(x.reshape(1, 4, -1, 4)).reshape(x.shape)
        return self.head(x) + self.big_head(x)


X = torch.randn(4, 8, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize(
    "targets",
    [
        ["q"],
        ["inner.q"],
        ["q", "inner.q"],
        ["inner.a+b"],
        ["inner.aab"],
        ["inner.q", "inner.a+b"],
        ["big_head", "head"],
    ],
    ids="-".join,
)
def test_exactly_these_modules(targets: list[str], tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Names().eval()
    patterns = [re.escape(target) for target in targets]
    ranks = [{"match": {"regex": patterns[0]}, "params": {"rank": 2}}]
    compiled = stirred(model, lora(target={"regex": patterns}, overrides=ranks))
    theirs = same_in_peft(compiled, model, tmp_path, lambda m: m(X))
    assert sorted(theirs.base_model.targeted_module_names) == sorted(targets)


@torch.no_grad()
def test_groups_of_a_convolution(tmp_path: Path) -> None:
    model = Names().eval()
    compiled = stirred(model, lora(target="conv"), lora("c", "conv", rank=2, init="normal"))
    compiled.save_as("peft", tmp_path)
    found = reloaded(model, tmp_path)(X)
    assert not torch.allclose(found, model(X), atol=1e-3)
    torch.testing.assert_close(found, compiled(X), atol=1e-5, rtol=1e-5)


def test_heads_that_no_list_tells_apart(tmp_path: Path) -> None:
    model = Names().eval()
    full = {"name": "f", "method": "full", "target": {"path": "head"}}
    with pytest.raises(deltaspec.DeltaSpecError, match="DS560.*modules_to_save"):
        stirred(model, full).save_as("peft", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    same_in_peft(stirred(model, full | {"target": {"path": "big_head"}}), model, tmp_path, lambda m: m(X))


@pytest.mark.parametrize(
    ("deltas", "reason"),
    [
        ([{"name": "a", "method": "adapter", "target": {"role": "mlp"}}], "adapter has no form in PEFT"),
        ([lora(use_dora=True), lora("c")], "DoRA stands alone"),
        ([{"name": "b", "method": "bitfit", "target": {"role": "norm"}}], "has no bias"),
    ],
    ids=["adapter", "dora", "bitfit"],
)
def test_refused(llama: Any, deltas: list[Any], reason: str, tmp_path: Path) -> None:
    compiled = stirred(llama, *deltas)
    with pytest.raises(deltaspec.DeltaSpecError, match=f"DS560.*{reason}"):
        compiled.save_as("peft", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_dora_at_half_strength_is_refused(llama: Any, tmp_path: Path) -> None:
    compiled = stirred(llama, lora(use_dora=True))
    compiled.only({"a": 0.5})
    with pytest.raises(deltaspec.DeltaSpecError, match="strength 0.5"):
        compiled.save_as("peft", tmp_path)
    assert not any(tmp_path.iterdir())


def test_forms_and_directories(llama: Any, tmp_path: Path) -> None:
    compiled = stirred(llama, lora())
    with pytest.raises(deltaspec.DeltaSpecError, match=r"DS561[\s\S]*did you mean peft"):
        compiled.save_as("pefd", tmp_path)
    compiled.save(tmp_path)
    with pytest.raises(deltaspec.DeltaSpecError, match="DS562"):
        compiled.save_as("peft", tmp_path)
    compiled.detach()
    with pytest.raises(deltaspec.DeltaSpecError, match="DS417"):
        compiled.save_as("peft", tmp_path / "other")


def test_the_spec_and_the_lock_go_along(llama: Any, tmp_path: Path) -> None:
    compiled = stirred(llama, lora("user/french"))
    compiled.save_as("peft", tmp_path)
    assert deltaspec.plan(llama, tmp_path / "user%2Ffrench.deltaspec.json") == compiled.plan
    card = (tmp_path / "README.md").read_text()
    assert "library_name: peft" in card
    assert "user/french" in card
