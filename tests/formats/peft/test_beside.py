"""What PEFT saves beside a type's tensors, read as PEFT reads it: whole modules, biases, embeddings, tokens' rows."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from beside_peft import as_theirs, moved, reloaded, saved
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

import deltaspec

IDS = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6]])
SIZES: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "vocab_size": 30,
}
SIZES |= {"initializer_range": 0.2}
WEIGHTS = "adapter_model.safetensors"
EMBED = "base_model.model.model.embed_tokens"


@pytest.fixture(scope="module")
def models() -> dict[str, Any]:
    torch.manual_seed(0)
    found = {
        "llama": LlamaForCausalLM(LlamaConfig(**SIZES, attention_bias=True)),
        "tied": LlamaForCausalLM(LlamaConfig(**SIZES, tie_word_embeddings=True)),
        "bert": BertForSequenceClassification(BertConfig(**SIZES, max_position_embeddings=16, num_labels=3)),
        "gpt2": GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=30, initializer_range=0.2)),
    }
    for name in ("bert", "llama", "gpt2"):  # biases start at zero, which hides who reads them
        for key, parameter in found[name].named_parameters():
            if key.endswith("bias"):
                torch.nn.init.normal_(parameter)
    return {name: model.eval() for name, model in found.items()}


def logits(model: Any) -> Tensor:
    found: Tensor = model(input_ids=IDS).logits
    return found


def short(value: Any) -> str:
    """Return a parameter of a test as its name: of a configuration, what was said."""
    if not isinstance(value, peft.PeftConfig):
        return str(value)
    usual = type(value)()
    given = {key: option for key, option in vars(value).items() if option != getattr(usual, key, None)}
    listed = {key: sorted(option) if isinstance(option, set) else option for key, option in given.items()}
    return f"{value.peft_type}-" + "-".join(f"{key}={listed[key]}" for key in sorted(listed) if key != "r")


def lora(**options: Any) -> Any:
    return peft.LoraConfig(**{"target_modules": ["q_proj"], "r": 2} | options)


def bert_lora(**options: Any) -> Any:
    return lora(**{"target_modules": ["query"], "task_type": "SEQ_CLS"} | options)


TIED_TARGETS = lora(target_modules=["embed_tokens", "lm_head"], ensure_weight_tying=True)


def refusal(model: Any, folder: Path) -> str:
    with pytest.raises(deltaspec.DeltaSpecError) as error:
        deltaspec.restore(model, folder)
    return str(error.value)


def change(folder: Path, edit: Callable[[dict[str, Tensor]], Any], **options: Any) -> None:
    """Edit an adapter's tensors and options."""
    tensors = load_file(folder / WEIGHTS)
    edit(tensors)
    save_file(tensors, folder / WEIGHTS)
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | options))


def without(*parts: str) -> Callable[[dict[str, Tensor]], Any]:
    """Return an edit that drops the keys with these in their names."""

    def edit(tensors: dict[str, Tensor]) -> None:
        for key in [key for key in tensors if any(part in key for part in parts)]:
            del tensors[key]

    return edit


@pytest.mark.parametrize(
    ("model", "config"),
    [
        ("llama", lora(modules_to_save=["norm"])),
        ("llama", lora(modules_to_save=["0.self_attn", "head"], target_modules=["up_proj"])),
        ("llama", lora(use_dora=True, bias="all")),
        ("llama", lora(use_dora=True, bias="lora_only", target_modules=["q_proj", "up_proj"])),
        ("llama", peft.OFTConfig(target_modules=["q_proj"], oft_block_size=4, bias="all")),
        ("llama", peft.BOFTConfig(target_modules=["q_proj"], boft_block_size=4, bias="all")),
        ("bert", bert_lora()),
        ("bert", bert_lora(bias="all")),
        ("bert", bert_lora(bias="lora_only", use_dora=True)),
        ("bert", lora(target_modules=["key"], bias="all", modules_to_save=["pooler"])),
        ("bert", peft.HRAConfig(r=2, target_modules=["query"], bias="hra_only")),
        ("gpt2", lora(target_modules=["c_attn"], fan_in_fan_out=True, bias="all", use_dora=True)),
        ("tied", lora(modules_to_save=["embed_tokens"])),
        ("tied", lora(modules_to_save=["embed_tokens"], ensure_weight_tying=True)),
        ("tied", lora(modules_to_save=["lm_head"], ensure_weight_tying=True)),
        ("tied", lora(modules_to_save=["lm_head", "embed_tokens"])),
        ("llama", lora(trainable_token_indices={"lm_head": [2, 5], "embed_tokens": [1]})),
        ("tied", TIED_TARGETS),
        ("tied", lora(trainable_token_indices=[1, 4, 9])),
        ("tied", lora(trainable_token_indices={"embed_tokens": [1, 4], "lm_head": [2, 5, 6]})),
        ("tied", lora(trainable_token_indices={"lm_head": [2, 5, 6]})),
    ],
    ids=short,
)
def test_peft_computes_the_same(models: dict[str, Any], model: str, config: Any, tmp_path: Path) -> None:
    compiled = as_theirs(models[model], moved(models[model], config), tmp_path / "french", logits)
    with torch.no_grad():
        expected = logits(compiled)
        torch.testing.assert_close(logits(compiled.merge()), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("model", "config", "lost", "words"),
    [
        ("llama", lora(modules_to_save=["lm_head"]), "lm_head", "DS543.*lm_head.weight, which modules_to_save names"),
        ("llama", lora(modules_to_save=["norm"]), "1.input_layernorm", "DS543.*1.input_layernorm.weight, which mod"),
        ("bert", bert_lora(), "classifier", "DS543.*classifier.*which modules_to_save names"),
        ("bert", bert_lora(), "classifier.bias", "DS543.*classifier.bias, which modules_to_save names"),
        ("llama", lora(bias="all"), "k_proj.bias", "DS543.*k_proj.bias.*which bias: all trains"),
        ("llama", lora(bias="lora_only"), "1.self_attn.q_proj.base_layer.bias", "DS543.*q_proj.bias, which bias: lora"),
        ("tied", lora(modules_to_save=["embed_tokens"], ensure_weight_tying=True), "lm_head", "DS543.*lm_head.weight"),
        ("llama", lora(trainable_token_indices={"tokens": [1], "lm_head": [2]}), "lm_head", "DS543.*rows.*lm_head"),
        ("tied", TIED_TARGETS, "lm_head", "DS543.*has no factors for lm_head, which ensure_weight_tying ties"),
    ],
    ids=short,
)
def test_a_file_that_was_cut(
    models: dict[str, Any], model: str, config: Any, lost: str, words: str, tmp_path: Path
) -> None:
    folder = saved(moved(models[model], config), tmp_path / "cut")
    change(folder, without(lost))
    with pytest.raises(deltaspec.DeltaSpecError, match=words):
        deltaspec.restore(models[model], folder)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"modules_to_save": "lm_head"}, "modules_to_save: 'lm_head' is no list of names"),
        ({"modules_to_save": ["lm_head", ""]}, "is no list of names"),
        ({"trainable_token_indices": {"0.mlp.up_proj": [1, 2]}}, "a Linear that is no head, and tied to no table"),
        ({"trainable_token_indices": [1, 2, 1]}, "has 1 twice"),
        ({"trainable_token_indices": 5}, "says no tokens"),
    ],
    ids=short,
)
def test_options_that_are_not_read(models: dict[str, Any], options: dict[str, Any], words: str, tmp_path: Path) -> None:
    indices = options.get("trainable_token_indices")
    known = {"trainable_token_indices": indices} if isinstance(indices, (list, dict)) else {}
    folder = saved(moved(models["llama"], lora(**known)), tmp_path / "a")
    change(folder, without(), **options)
    found = refusal(models["llama"], folder)
    assert "DS544" in found and words in found and "adapter_config.json" in found and "DS4" not in found


def test_a_rounded_copy_of_an_embedding_is_what_peft_runs(models: dict[str, Any], tmp_path: Path) -> None:
    for name in ("llama", "tied"):
        folder = saved(moved(models[name], lora(target_modules=["embed_tokens"])), tmp_path / name)
        change(folder, lambda t: t.update({f"{EMBED}.base_layer.weight": t[f"{EMBED}.base_layer.weight"].bfloat16()}))
        compiled = deltaspec.restore(models[name], folder)
        with torch.no_grad():
            torch.testing.assert_close(logits(compiled), logits(reloaded(models[name], folder)), atol=1e-5, rtol=1e-5)
        assert any(delta.endswith("embeddings") for delta in compiled.deltas)


@pytest.mark.parametrize(
    "value", [torch.tensor(1.0), torch.ones(30, 16, dtype=torch.int8), torch.ones(31, 16)], ids=str
)
def test_a_copy_of_an_embedding_that_is_none(models: dict[str, Any], value: Tensor, tmp_path: Path) -> None:
    folder = saved(moved(models["llama"], lora(target_modules=["embed_tokens"])), tmp_path / "a")
    change(folder, lambda t: t.update({f"{EMBED}.base_layer.weight": value}))
    assert "DS526" in refusal(models["llama"], folder)


@pytest.mark.parametrize(
    ("model", "config", "key"),
    [
        ("tied", lora(modules_to_save=["embed_tokens"], ensure_weight_tying=True), "base_model.model.lm_head.weight"),
        ("bert", bert_lora(bias="all"), "base_model.model.classifier.modules_to_save.bias"),
        ("tied", TIED_TARGETS, "base_model.model.lm_head.lora_A.weight"),
    ],
    ids=["tied", "wrapped", "factors"],
)
def test_one_parameter_with_two_values(
    models: dict[str, Any], model: str, config: Any, key: str, tmp_path: Path
) -> None:
    folder = saved(moved(models[model], config), tmp_path / "a")
    change(folder, lambda t: t.update({key: t[key] + 1}))
    assert "DS539" in refusal(models[model], folder)


def test_peft_ties_by_the_configuration(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SIZES, tie_word_embeddings=True)).eval()
    model.config.tie_word_embeddings = False
    compiled = as_theirs(model, moved(model, lora(trainable_token_indices=[1, 4, 9])), tmp_path / "french", logits)
    assert compiled.plan["french-tokens"].params.tied == "alone"


def test_a_tied_head_whose_bias_peft_leaves_out(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = BertForMaskedLM(BertConfig(**SIZES, max_position_embeddings=16)).eval()
    folder = saved(moved(model, lora(target_modules=["query"], trainable_token_indices=[1, 4])), tmp_path / "a")
    assert "DS548" in (found := refusal(model, folder)) and "runs it without its bias" in found


def test_under_another_prefix(models: dict[str, Any], tmp_path: Path) -> None:
    """An adapter of a whole model fits its body, and the reverse: what the saved model did not have is not missed."""
    folder = saved(moved(models["llama"], lora(modules_to_save=["model.norm"], bias="all")), tmp_path / "whole")
    assert deltaspec.restore(models["llama"].model, folder).deltas
    body = bert_lora(bias="all", task_type=None, modules_to_save=["classifier"])
    folder = saved(moved(models["bert"].bert, body), tmp_path / "body")
    assert deltaspec.restore(models["bert"], folder).deltas
    change(folder, without("value.bias"))
    assert "value.bias, which bias: all trains" in refusal(models["bert"], folder)
