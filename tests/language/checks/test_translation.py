"""PEFT's configurations in our words: every type that we have becomes a valid spec, and what has no word is named."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

from deltaspec.language.checks.translation import our_name, peft_name, translated
from deltaspec.methods.registry import builtin_methods

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
    ("PREFIX_TUNING", {"prefix_projection": True}, {"tokens": 5, "reparametrisation": "mlp"}),
])  # fmt: skip
def test_parameters(kind, options, params, tmp_path):
    found = translated(written(tmp_path, kind, **options))
    assert found is not None
    assert found[0]["deltas"][0]["params"] == params and found[1] == []


def test_what_becomes_a_delta_of_its_own(tmp_path):
    found = translated(written(tmp_path, "LORA", modules_to_save=["score"], bias="all", trainable_token_indices=[3, 4]))
    assert found is not None
    assert [(delta["name"], delta["method"]) for delta in found[0]["deltas"]] == [
        ("default", "lora"), ("saved", "full"), ("tokens", "trainable_tokens"), ("biases", "bitfit"),
    ]  # fmt: skip


def test_what_has_no_word_is_named_and_what_needs_the_model_has_no_spec(tmp_path):
    found = translated(written(tmp_path, "LORA", init_lora_weights="olora"))
    assert found is not None and found[1] == ["init_lora_weights"]
    found = translated(written(tmp_path, "BOFT", boft_dropout=0.5))
    assert found is not None and found[1] == ["boft_dropout"]
    assert translated(written(tmp_path, "BOFT", boft_block_size=0, boft_block_num=4)) is None
    assert translated({"peft_type": "XLORA"}) is None
    assert translated({"peft_type": "LORA", "r": -1, "target_modules": ["q"]}) is None
