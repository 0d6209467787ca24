"""Prompt types of PEFT, read beside PEFT: all that it saves of them is one table."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from beside_peft import moved, saved
from prefixes import qwen3
from prompt_models import BASIC, COMMON, bart, build, gemma3, gpt2, llama, opt, t5, tokens
from torch import Tensor
from transformers import (
    AutoModel,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    BertConfig,
    ElectraConfig,
    GPT2Config,
    LlamaConfig,
    RobertaConfig,
)

import deltaspec

SEVERAL = {gpt2: "CAUSAL_LM", llama: "CAUSAL_LM", gemma3: "CAUSAL_LM", opt: "CAUSAL_LM", qwen3: "CAUSAL_LM"}
SEQ2SEQ = {t5: "SEQ_2_SEQ_LM", bart: "SEQ_2_SEQ_LM"}


def inputs(make: Any, padded: str = "") -> dict[str, Tensor]:
    found = {"input_ids": tokens(2, 9)}
    if padded:
        mask = torch.ones_like(found["input_ids"])
        mask[0, (slice(0, 3) if padded == "left" else slice(6, 9))] = 0
        found["attention_mask"] = mask
    return found | ({"decoder_input_ids": tokens(2, 5)} if make in SEQ2SEQ else {})


def compared(c: Any, made: Any, given: dict[str, Tensor], more: int) -> None:
    """Assert that logits agree, of the tokens alone, where PEFT's begin with `more` of the prompt."""
    theirs = made(**given).logits
    theirs = theirs[:, more:] if theirs.dim() == 3 else theirs
    ours = c(**given).logits
    assert ours.shape == theirs.shape
    seen = given.get("attention_mask") if "decoder_input_ids" not in given and ours.dim() == 3 else None
    ours, theirs = (ours, theirs) if seen is None else (ours[seen == 1], theirs[seen == 1])
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("projection", [False, True])
@pytest.mark.parametrize("make", [*SEVERAL, *SEQ2SEQ])
def test_prefix_tuning(make: Any, projection: bool, tmp_path: Path) -> None:
    model = build(make)
    task = {**SEVERAL, **SEQ2SEQ}[make]
    config = peft.PrefixTuningConfig(task_type=task, num_virtual_tokens=3, prefix_projection=projection)
    made = moved(model, config)
    c = deltaspec.restore(model, saved(made, tmp_path / "french"))
    assert c.plan["french"].method == "prefix"
    for padded in ("", "left", "right"):
        compared(c, made, inputs(make, padded), 0)
    assert not torch.allclose(c(**inputs(make)).logits, model(**inputs(make)).logits, atol=1e-3)
    with torch.no_grad():
        generating = {key: value for key, value in inputs(make, "left").items() if "decoder" not in key}
        how = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}
        assert torch.equal(c.generate(**generating, **how), made.generate(**generating, **how))


@pytest.mark.parametrize("type", ["prompt", "mlp", "lstm"])
@pytest.mark.parametrize("make", [*SEVERAL, *SEQ2SEQ])
def test_prompts_in_front(make: Any, type: str, tmp_path: Path) -> None:
    model, task = build(make), {**SEVERAL, **SEQ2SEQ}[make]
    config = peft.PromptTuningConfig(task_type=task, num_virtual_tokens=3, prompt_tuning_init="SAMPLE_VOCAB")
    if type != "prompt":
        kind = {"encoder_reparameterization_type": type.upper(), "encoder_hidden_size": 8, "encoder_dropout": 0.1}
        config = peft.PromptEncoderConfig(task_type=task, num_virtual_tokens=3, **kind)
    made = moved(model, config)
    c = deltaspec.restore(model, saved(made, tmp_path / "french"))
    assert c.plan["french"].method == "soft_prompt"
    for padded in ("", "left", "right"):
        compared(c, made, inputs(make, padded), 0 if make in SEQ2SEQ else 3)
    assert not torch.allclose(c(**inputs(make)).logits, model(**inputs(make)).logits, atol=1e-3)
    with torch.no_grad():
        generating = {key: value for key, value in inputs(make, "left").items() if "decoder" not in key}
        how = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}
        assert torch.equal(c.generate(**generating, **how), made.generate(**generating, **how))


CONFIGS = {
    "bert": lambda: BertConfig(**BASIC, max_position_embeddings=64, num_labels=2),
    "roberta": lambda: RobertaConfig(**BASIC, max_position_embeddings=64, num_labels=2),
    "electra": lambda: ElectraConfig(**BASIC, embedding_size=32, max_position_embeddings=64, num_labels=2),
    "gpt2": lambda: GPT2Config(**COMMON, n_embd=32, n_layer=2, n_head=4, n_positions=64, num_labels=2),
    "llama": lambda: LlamaConfig(**BASIC, num_key_value_heads=2, num_labels=2),
}
TASKS = {
    "SEQ_CLS": AutoModelForSequenceClassification,
    "TOKEN_CLS": AutoModelForTokenClassification,
    "QUESTION_ANS": AutoModelForQuestionAnswering,
    "FEATURE_EXTRACTION": AutoModel,
}
KINDS = {"prefix": peft.PrefixTuningConfig, "prompt": peft.PromptTuningConfig, "p": peft.PromptEncoderConfig}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("name", CONFIGS)
def test_tasks(name: str, task: str, kind: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = TASKS[task].from_config(CONFIGS[name]()).eval()
    more = {"encoder_hidden_size": 8} if kind == "p" else {}
    made = moved(model, KINDS[kind](task_type=task, num_virtual_tokens=3, **more))
    c = deltaspec.restore(model, saved(made, tmp_path / "french"))
    given = inputs(None, "" if task == "SEQ_CLS" and name in ("gpt2", "llama") else "right")
    ours, theirs = c(**given)[0], made(**given)[0]
    theirs = theirs if ours.dim() < 2 or theirs.shape[1] == ours.shape[1] else theirs[:, 3:]
    seen = given["attention_mask"] == 1 if ours.dim() > 1 and ours.shape[1] == 9 and len(given) > 1 else ...
    torch.testing.assert_close(ours[seen], theirs[seen], atol=1e-5, rtol=1e-5)
    assert not torch.allclose(ours, model(**given)[0], atol=1e-3)
