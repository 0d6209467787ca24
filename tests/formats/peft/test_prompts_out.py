"""Prompts and prefixes written as PEFT's: it gives the same logits with them, and they read back to the same."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from as_peft import stirred
from beside_peft import moved, saved
from prefixes import qwen3
from prompt_models import BASIC, build, gpt2, llama, t5, tokens
from safetensors.torch import load_file
from transformers import (
    BertConfig,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertForTokenClassification,
    LlamaConfig,
    LlamaForSequenceClassification,
    RobertaConfig,
    RobertaForSequenceClassification,
)

import deltaspec
from deltaspec.diagnostics.findings import DeltaSpecError

PROMPTS = [
    ("PROMPT_TUNING", "soft_prompt", {"tokens": 3}),
    ("PROMPT_TUNING", "p_tuning", {"tokens": 3, "width": 4}),
    ("PREFIX_TUNING", "prefix", {"tokens": 3, "positions": "counted"}),
    ("PREFIX_TUNING", "prefix", {"tokens": 3, "positions": "counted", "reparametrisation": "mlp", "width": 5}),
]


@torch.no_grad()
def compared(compiled: Any, model: Any, folder: Path) -> Any:
    given = {"input_ids": tokens(2, 9)}
    if model.config.is_encoder_decoder:
        given["decoder_input_ids"] = tokens(2, 5)
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(model), folder).eval()
    expected = compiled(**given).logits
    found = theirs(**given).logits[:, -expected.shape[1] :]
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(deltaspec.restore(model, folder)(**given).logits, expected, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(model(**given).logits, expected, atol=1e-3)
    return theirs.peft_config["default"]


@pytest.mark.parametrize(("kind", "method", "params"), PROMPTS, ids=lambda value: str(value))
@pytest.mark.parametrize("make", [gpt2, llama, qwen3])
def test_peft_computes_the_same(make: Any, kind: str, method: str, params: dict[str, Any], tmp_path: Path) -> None:
    model = build(make)
    compiled = stirred(model, {"name": "p", "method": method, "params": params})
    compiled.save_as("peft", tmp_path)
    assert compared(compiled, model, tmp_path).peft_type == kind


@pytest.mark.parametrize("config", [peft.PrefixTuningConfig, peft.PromptTuningConfig, peft.PromptEncoderConfig])
def test_what_peft_saved_for_an_encoder_and_a_decoder_goes_through(config: Any, tmp_path: Path) -> None:
    model = build(t5)
    made = moved(model, config(task_type="SEQ_2_SEQ_LM", num_virtual_tokens=3))
    compiled = deltaspec.restore(model, saved(made, tmp_path / "in"))
    compiled.save_as("peft", tmp_path / "out")
    compared(compiled, model, tmp_path / "out")


@pytest.mark.parametrize(
    ("deltas", "reason"),
    [
        ([{"name": "p", "method": "prefix", "params": {"tokens": 3}}], "takes the first positions, and this one none"),
        ([{"name": "p", "method": "soft_prompt", "params": {"tokens": 3}},
          {"name": "b", "method": "bitfit"}], "stand alone"),
        ([{"name": "p", "method": "soft_prompt", "params": {"tokens": 3}},
          {"name": "q", "method": "soft_prompt", "params": {"tokens": 2}}], "stand alone"),
    ],
    ids=["positions", "biases", "two"],
)  # fmt: skip
def test_refused(deltas: list[Any], reason: str, tmp_path: Path) -> None:
    with pytest.raises(deltaspec.DeltaSpecError, match=f"DS560.*{reason}"):
        stirred(build(gpt2), *deltas).save_as("peft", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_two_prefixes_are_not_one(tmp_path: Path) -> None:
    params = {"tokens": 2, "positions": "counted"}
    deltas = [{"name": name, "method": "prefix", "params": params} for name in ("a", "b")]
    with pytest.raises(DeltaSpecError, match="stand alone"):
        stirred(build(llama), *deltas).save_as("peft", tmp_path / "out")
    assert not (tmp_path / "out").exists()


CLASSIFIERS = {
    "bert": (BertForSequenceClassification, BertConfig(**BASIC, max_position_embeddings=64), "classifier", "tokens"),
    "roberta": (RobertaForSequenceClassification, RobertaConfig(**BASIC, max_position_embeddings=64), "**.out_proj",
                "all"),
    "llama": (LlamaForSequenceClassification, LlamaConfig(**BASIC, num_key_value_heads=2), "score", "tokens"),
    "tokens": (BertForTokenClassification, BertConfig(**BASIC, max_position_embeddings=64), "classifier", "tokens"),
    "answers": (BertForQuestionAnswering, BertConfig(**BASIC, max_position_embeddings=64), "qa_outputs", "tokens"),
}  # fmt: skip


@pytest.mark.parametrize("method", ["soft_prompt", "p_tuning", "prefix"])
@pytest.mark.parametrize(("name", "head"), [("bert", False), *((name, True) for name in CLASSIFIERS)])
@torch.no_grad()
def test_heads_beside_a_prompt(name: str, head: bool, method: str, tmp_path: Path) -> None:
    kind, config, place, output = CLASSIFIERS[name]
    torch.manual_seed(0)
    model = kind(config).eval()
    params = {"tokens": 3} | ({"positions": "counted"} if method == "prefix" else {"output": output})
    delta = {"name": "p", "method": method, "params": params | ({"width": 4} if method == "p_tuning" else {})}
    compiled = stirred(model, delta, *([{"name": "h", "method": "full", "target": {"path": place}}] if head else []))
    compiled.save_as("peft", tmp_path)
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(model), tmp_path).eval()
    given = {"input_ids": tokens(2, 9)}
    expected, found = compiled(**given)[0], theirs(**given)[0]
    found = found[:, -expected.shape[1] :] if name in ("tokens", "answers") else found
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(deltaspec.restore(model, tmp_path)(**given)[0], expected, atol=1e-5, rtol=1e-5)
    again = saved(theirs, tmp_path / "again")
    before, after = (load_file(folder / "adapter_model.safetensors") for folder in (tmp_path, again))
    assert before.keys() == after.keys()
    assert all(torch.equal(value, after[key]) for key, value in before.items())


def test_a_language_model_s_head_beside_a_prompt(tmp_path: Path) -> None:
    model = build(llama)
    head = {"name": "h", "method": "full", "target": {"role": "head"}}
    compiled = stirred(model, {"name": "p", "method": "soft_prompt", "params": {"tokens": 3}}, head)
    compiled.save_as("peft", tmp_path)
    assert compared(compiled, model, tmp_path).modules_to_save == ["lm_head"]


def test_positions_that_peft_s_classifier_would_not_read(tmp_path: Path) -> None:
    model = RobertaForSequenceClassification(RobertaConfig(**BASIC, max_position_embeddings=64))
    with pytest.raises(DeltaSpecError, match=r"reads the prompt's first position.*output: tokens"):
        stirred(model, {"name": "p", "method": "soft_prompt", "params": {"tokens": 3}}).save_as("peft", tmp_path)
