"""PEFT's configurations in our words: every type that we have becomes a valid spec, and what has no word is named."""

from __future__ import annotations

import copy
import dataclasses
import json
import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import yaml
from peft import LoraConfig, get_peft_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from tiny_models import BASIC, llama
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForSequenceClassification,
    LlamaForTokenClassification,
    RobertaConfig,
    RobertaForSequenceClassification,
    RobertaForTokenClassification,
)

import deltaspec
from deltaspec.formats.convert import convert
from deltaspec.language.checks.translation import our_name, peft_name, translated
from deltaspec.methods.registry import builtin_methods
from deltaspec.names.paths import is_inside

KINDS = [kind for kind in PEFT_TYPE_TO_CONFIG_MAPPING if our_name(kind) in builtin_methods()]
GIVEN: dict[str, dict[str, Any]] = {
    "TRAINABLE_TOKENS": {"token_indices": [1, 2]},
    "ADALORA": {"target_modules": ["q_proj"], "total_step": 100},
    "OFT": {"target_modules": ["q_proj"], "oft_block_size": 8},
    "LN_TUNING": {"target_modules": ["norm"]},
}


def written(folder: Path, kind: str, **options: Any) -> dict[str, Any]:
    """Return a configuration as PEFT writes it."""
    cls = PEFT_TYPE_TO_CONFIG_MAPPING[kind]
    fields = {field.name for field in dataclasses.fields(cls)}
    prompt = {"num_virtual_tokens": 5} if "num_virtual_tokens" in fields else {"target_modules": ["q_proj", "v_proj"]}
    cls(**(GIVEN.get(kind, prompt) | options)).save_pretrained(folder)
    data: dict[str, Any] = json.loads((folder / "adapter_config.json").read_text())
    return data


def test_names_of_methods_there_and_here():
    assert len(KINDS) > 19 and [peft_name(our_name(kind)) for kind in KINDS] == KINDS


@pytest.mark.parametrize("kind", KINDS)
def test_each_type_becomes_a_spec_as_it_is_by_default(kind, tmp_path):
    found = translated(written(tmp_path, kind))
    assert found is not None
    spec, left_out = found
    assert [delta["method"] for delta in spec["deltas"]] == [our_name(kind)] and left_out == []


@pytest.mark.parametrize("kind, options, params", [
    ("LORA", {"r": 3, "lora_alpha": 5, "use_dora": True, "lora_dropout": 0.1},
     {"rank": 3, "alpha": 5, "use_dora": True, "dropout": 0.1}),
    ("LORA", {"init_lora_weights": "pissa_niter_4"}, {"rank": 8, "alpha": 8, "init": "pissa", "svd_iterations": 4}),
    ("ADALORA", {"target_r": 4, "init_r": 6, "r": 99}, {"rank": 4, "alpha": 8, "initial_rank": 6}),
    ("LOKR", {"decompose_factor": 4}, {"rank": 8, "alpha": 8, "factor": 4}),
    ("ROAD", {"variant": "road_4", "group_size": 8}, {"variant": 4, "group_size": 8}),
    ("VERA", {"r": 16, "d_initial": 0.5}, {"rank": 16, "initial_scale": 0.5}),
    ("ADALORA", {"target_r": 8, "init_r": 6}, {"rank": 6, "alpha": 8, "initial_rank": 6}),
    ("HIRA", {"init_weights": "gaussian"}, {"rank": 32, "init": "normal"}),
    ("LOKR", {"init_weights": "lycoris"}, {"rank": 8, "alpha": 8, "init": "zero_large"}),
    ("DELORA", {}, {"rank": 8, "init": "zeros"}),
    ("OFT", {}, {"block_size": 8}),
    ("OFT", {"coft": True, "eps": 1e-3}, {"block_size": 8, "constraint": 1e-3}),
    ("OFT", {"use_cayley_neumann": False}, {"block_size": 8, "transform": "cayley"}),
    ("PREFIX_TUNING", {"token_dim": 8, "encoder_hidden_size": 8}, {"tokens": 5, "positions": "counted"}),
    ("PREFIX_TUNING", {"prefix_projection": True, "token_dim": 8},
     {"tokens": 5, "positions": "counted", "reparametrisation": "mlp", "width": 8}),
    ("PROMPT_TUNING", {}, {"tokens": 5, "place": "front", "init": "uniform"}),
    ("P_TUNING", {"encoder_hidden_size": 8}, {"tokens": 5, "place": "front", "width": 8}),
])  # fmt: skip
def test_parameters(kind, options, params, tmp_path):
    found = translated(written(tmp_path, kind, **options))
    assert found is not None
    assert found[0]["deltas"][0]["params"] == params and found[1] == []


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_left_out_is_what_peft_takes_for_it(kind, tmp_path):
    config = written(tmp_path, kind)
    given = {"peft_type", "target_modules", "num_virtual_tokens", *GIVEN.get(kind, {})}
    assert translated({key: value for key, value in config.items() if key in given}) == translated(config)


@pytest.mark.parametrize("model", [
    LlamaForSequenceClassification(LlamaConfig(**BASIC)), LlamaForTokenClassification(LlamaConfig(**BASIC)),
    BertForSequenceClassification(BertConfig(**BASIC)), RobertaForTokenClassification(RobertaConfig(**BASIC)),
    RobertaForSequenceClassification(RobertaConfig(**BASIC)),
], ids=lambda model: type(model).__name__)  # fmt: skip
@pytest.mark.parametrize("more", [[], ["embeddings.word_embeddings", "embed_tokens"]])
def test_the_head_that_peft_trains_in_full_is_planned(model, more, tmp_path):
    names = [name for name in more if any(fqn.endswith(name) for fqn, _ in model.named_modules())]
    task = "TOKEN_CLS" if "Token" in type(model).__name__ else "SEQ_CLS"
    options = LoraConfig(target_modules=r".*(q_proj|query)", task_type=task, modules_to_save=names or None)
    with warnings.catch_warnings(action="ignore"):
        theirs = get_peft_model(copy.deepcopy(model), options)
    theirs.peft_config["default"].save_pretrained(tmp_path)
    found = translated(json.loads((tmp_path / "adapter_config.json").read_text()))
    assert found is not None
    trained = {name.replace("base_model.model.", "") for name, p in theirs.named_parameters() if p.requires_grad}
    saved = {re.sub(r"\.modules_to_save\.default.*", "", name) for name in trained if "modules_to_save" in name}
    ours = [site.fqn for site in deltaspec.plan(model, found[0])["saved"].sites]
    assert ours and {next(name for name in saved if is_inside(fqn, name)) for fqn in ours} == saved


@pytest.mark.parametrize("kind", ["PREFIX_TUNING", "PROMPT_TUNING", "P_TUNING"])
def test_prompts_are_where_convert_puts_them(kind, tmp_path):
    with warnings.catch_warnings(action="ignore"):
        config = PEFT_TYPE_TO_CONFIG_MAPPING[kind](num_virtual_tokens=3, task_type="CAUSAL_LM")
        get_peft_model(llama(), config).save_pretrained(tmp_path / "adapter")
    found = translated(json.loads((tmp_path / "adapter" / "adapter_config.json").read_text()))
    assert found is not None
    spec = yaml.safe_load(convert(tmp_path / "adapter", tmp_path / "out", llama()).spec.read_text())
    params, theirs = (made["deltas"][0]["params"] for made in (found[0], spec))
    assert {**params, **theirs} == params and {"place", "output", "positions"} & params.keys() <= theirs.keys()


def test_what_becomes_a_delta_of_its_own(tmp_path):
    found = translated(written(tmp_path, "LORA", modules_to_save=["score"], bias="all", trainable_token_indices=[3, 4]))
    assert found is not None
    assert [(delta["name"], delta["method"]) for delta in found[0]["deltas"]] == [
        ("default", "lora"), ("saved", "full"), ("tokens", "trainable_tokens"), ("biases", "bitfit"),
    ]  # fmt: skip


def test_what_has_no_word_is_named_and_what_needs_the_model_has_no_spec(tmp_path):
    found = translated(written(tmp_path, "LORA") | {"use_qalora": True, "use_newest": 3})
    assert found is not None and found[1] == ["use_qalora", "use_newest"]
    assert translated(written(tmp_path, "BOFT", boft_block_size=0, boft_block_num=4)) is None
    assert translated({"peft_type": "XLORA"}) is None
    for wrong in (
        {"target_modules": 3},
        {"rank_pattern": [1]},
        {"modules_to_save": "head"},
        {"layers_to_transform": 1.5},
    ):
        assert translated({"peft_type": "LORA", "target_modules": ["q"], **wrong}) is None
    # In front of a classifier, `output` depends on the model.
    assert translated({"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 3, "task_type": "SEQ_CLS"}) is None
    assert translated({"peft_type": "P_TUNING"}) is None
    assert translated({"peft_type": "LORA", "r": -1, "target_modules": ["q"]}) is None
