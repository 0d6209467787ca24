"""Prompt types of PEFT, read beside PEFT: all that it saves of them is one table."""

from __future__ import annotations

import json
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
    AutoModelForCausalLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    BertConfig,
    BloomConfig,
    ElectraConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    ModernBertConfig,
    RobertaConfig,
    T5Config,
    T5ForConditionalGeneration,
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


@pytest.mark.parametrize("make", [llama, t5])
def test_prefix_tuning_has_peft_s_gradients(make: Any, tmp_path: Path) -> None:
    model, task = build(make), {**SEVERAL, **SEQ2SEQ}[make]
    made = moved(model, peft.PrefixTuningConfig(task_type=task, num_virtual_tokens=3))
    c = deltaspec.restore(model, saved(made, tmp_path / "french"))
    given = inputs(make, "left") | {"labels": tokens(2, 5 if make is t5 else 9)}
    given.pop("decoder_input_ids", None)
    for one in (c, made):
        one(**given).loss.backward()
    theirs = made.prompt_encoder["default"].embedding.weight.grad.view(3, 4, -1).unbind(1)
    grads = {key: tensor.grad for key, tensor in c.deltas["french"].tensors()}
    sites = [site.fqn for site in c.plan["french"].sites]
    for place, name in enumerate(("key", "value")):
        ours = [grads[f"{fqn}.{name}"] for fqn in sites]
        if make is t5:  # two layers of the decoder have the same keys in PEFT
            torch.testing.assert_close(ours[0] + ours[1], theirs[place], atol=1e-6, rtol=1e-5)
        else:
            torch.testing.assert_close(ours, [theirs[place], theirs[2 + place]], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("make", [gpt2, bart])
def test_prompt_tuning_has_peft_s_gradients(make: Any, tmp_path: Path) -> None:
    model, task = build(make), {**SEVERAL, **SEQ2SEQ}[make]
    made = moved(model, peft.PromptTuningConfig(task_type=task, num_virtual_tokens=3))
    c = deltaspec.restore(model, saved(made, tmp_path / "french"))
    for one, more in ((c, 0), (made, 3 if make is gpt2 else 0)):
        logits = one(**inputs(make)).logits[:, more:]
        (logits * torch.randn(logits.shape, generator=torch.Generator().manual_seed(1))).sum().backward()
    (ours,) = (tensor.grad for _, tensor in c.deltas["french"].tensors())
    torch.testing.assert_close(ours, made.prompt_encoder["default"].embedding.weight.grad[:3], atol=1e-5, rtol=1e-5)


def test_layers_of_a_decoder_share_what_peft_gives_them(tmp_path: Path) -> None:
    torch.manual_seed(0)
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 3, "num_heads": 4, "decoder_start_token_id": 0}
    model = T5ForConditionalGeneration(T5Config(**COMMON, **sizes)).eval()
    made = moved(model, peft.PrefixTuningConfig(task_type="SEQ_2_SEQ_LM", num_virtual_tokens=3))
    c = deltaspec.restore(model, saved(made, tmp_path / "french"))
    compared(c, made, inputs(t5, "right"), 0)


def refused(model: Any, folder: Path, config: Any, code: str, match: str) -> None:
    made = moved(model, config)
    with pytest.raises(deltaspec.DeltaSpecError, match=match) as caught:
        deltaspec.restore(model, saved(made, folder / "french"))
    assert {finding.code for finding in caught.value.diagnostics} == {code}


def test_what_cannot_be_is_refused(tmp_path: Path) -> None:
    prefix, some = peft.PrefixTuningConfig, {"num_virtual_tokens": 3}
    torch.manual_seed(0)
    bloom = AutoModelForCausalLM.from_config(BloomConfig(**COMMON, hidden_size=32, n_layer=2, n_head=4)).eval()
    refused(bloom, tmp_path / "a", prefix(task_type="CAUSAL_LM", **some), "DS548", "transformers' attention function")
    one = prefix(task_type="SEQ_2_SEQ_LM", num_transformer_submodules=1, **some)
    refused(build(t5), tmp_path / "b", one, "DS548", "behind them, into one cache")
    sizes = {"global_attn_every_n_layers": 2, "local_attention": 6}
    encoder = AutoModel.from_config(ModernBertConfig(**BASIC, **sizes)).eval()
    refused(
        encoder, tmp_path / "c", prefix(task_type="FEATURE_EXTRACTION", **some), "DS548", "takes no past_key_values"
    )


def test_positions_by_ids_leave_padding_out_and_peft_s_do_not(tmp_path: Path) -> None:
    torch.manual_seed(0)
    notes = {}
    for name in ("bert", "roberta"):
        model = AutoModel.from_config(CONFIGS[name]()).eval()
        prompt = peft.PromptTuningConfig(task_type="FEATURE_EXTRACTION", num_virtual_tokens=3)
        made = moved(model, prompt)
        c = deltaspec.restore(model, saved(made, tmp_path / name))
        given = inputs(None, "left")
        given["input_ids"] = given["input_ids"].masked_fill(given["attention_mask"] == 0, model.config.pad_token_id)
        ours, theirs = c(**given)[0], made(**given)[0][:, 3:]
        torch.testing.assert_close(ours[1], theirs[1], atol=1e-5, rtol=1e-5)
        differs = not torch.allclose(ours[0, 3:], theirs[0, 3:], atol=1e-3)
        notes[name] = differs, any("numbers tokens by their ids" in note for note in c.plan.deltas[0].notes)
    assert notes == {"bert": (False, False), "roberta": (True, True)}


def test_heads_that_read_other_positions(tmp_path: Path) -> None:
    sizes = {"global_attn_every_n_layers": 2, "local_attention": 6, "num_labels": 2}
    for pooling in ("cls", "mean"):
        torch.manual_seed(0)
        config = ModernBertConfig(**BASIC, **sizes, classifier_pooling=pooling)
        model = AutoModelForSequenceClassification.from_config(config).eval()
        prompt = peft.PromptTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=3)
        if pooling == "mean":
            refused(model, tmp_path / pooling, prompt, "DS548", "averages over positions, in PEFT over the prompt's")
            continue
        made = moved(model, prompt)
        c = deltaspec.restore(model, saved(made, tmp_path / pooling))
        compared(c, made, inputs(None, "right"), 0)
        assert c.plan["cls"].params.output == "all"


def test_files_that_do_not_fit(tmp_path: Path) -> None:
    model = build(gpt2)
    folder = saved(moved(model, peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)), tmp_path / "a")
    config = json.loads((folder / "adapter_config.json").read_text())
    changes: list[tuple[dict[str, Any], str]] = [
        ({"num_virtual_tokens": 4}, "DS543"),
        ({"num_layers": None}, "DS544"),
        ({"new": 1}, "DS544"),
        ({"task_type": None}, "DS548"),
        ({"num_layers": 4, "token_dim": 16}, "DS523"),
    ]
    for change, code in changes:
        (folder / "adapter_config.json").write_text(json.dumps(config | change))
        with pytest.raises(deltaspec.DeltaSpecError) as caught:
            deltaspec.restore(model, folder)
        assert {finding.code for finding in caught.value.diagnostics} == {code}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    other = GPT2LMHeadModel(GPT2Config(**COMMON, n_embd=48, n_layer=2, n_head=4, n_positions=64))
    with pytest.raises(deltaspec.DeltaSpecError, match="DS526"):
        deltaspec.restore(other, folder)
