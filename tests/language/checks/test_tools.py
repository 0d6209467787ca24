"""Configurations of other tools: each is told as what it is, and what is printed for it is a valid spec."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import yaml
from peft import LoraConfig, get_peft_model
from tiny_models import base, llama

import deltaspec
from deltaspec.language.validate import validate_content

AXOLOTL = """\
base_model: HuggingFaceTB/SmolLM2-135M
load_in_8bit: false
datasets:
  - path: mhenrichsen/alpaca_2k_test
    type: alpaca
adapter: lora
lora_r: 32
lora_alpha: 16
lora_dropout: 0.05
lora_target_modules: [q_proj, down_proj]
lora_modules_to_save: [lm_head]
peft_use_rslora: true
sequence_len: 2048
micro_batch_size: 2
"""
LLAMA_FACTORY = """\
### model
model_name_or_path: meta-llama/Meta-Llama-3-8B-Instruct
trust_remote_code: true
### method
stage: sft
do_train: true
finetuning_type: lora
lora_rank: 8
lora_target: all
### dataset
dataset: identity,alpaca_en_demo
template: llama3
"""
LINEAR = {
    "any": [{"type": "Linear", "optional": True}, {"type": "Conv1D", "optional": True}],
    "not": {"role": "head", "optional": True},
}
"""What both call all linear layers: PEFT leaves the output head out."""


def finding(text: str, name: str) -> deltaspec.Diagnostic:
    (found,) = validate_content(text.encode(), name)
    assert found.code == "DS226"
    return found


def printed(found: deltaspec.Diagnostic) -> dict[str, Any]:
    """Return the spec in a suggestion, which is valid by itself, as YAML and as JSON."""
    _, _, text = (found.suggestion or "").partition(": {")
    spec = yaml.safe_load("{" + text)
    assert validate_content(("{" + text).encode(), "printed.yaml") == []
    assert deltaspec.validate(spec) == []
    return spec


def test_axolotl():
    found = finding(AXOLOTL, "config.yaml")
    assert found.message == "this is an Axolotl configuration, not a spec"
    params = {"rank": 32, "alpha": 16, "dropout": 0.05, "scaling": "rslora"}
    assert printed(found)["deltas"] == [
        {"name": "default", "method": "lora", "params": params, "target": {"path": ["**.q_proj", "**.down_proj"]}},
        {"name": "saved", "method": "full", "target": {"path": ["**.lm_head"]}},
    ]
    linear = finding(AXOLOTL.replace("lora_target_modules: [q_proj, down_proj]", "lora_target_linear: true"), "c.yaml")
    assert printed(linear)["deltas"][0]["target"] == LINEAR


def test_llama_factory():
    found = finding(LLAMA_FACTORY, "llama3_lora_sft.yaml")
    assert found.message == "this is a LLaMA-Factory configuration, not a spec"
    (delta,) = printed(found)["deltas"]
    assert delta["params"] == {"rank": 8, "alpha": 16}  # twice the rank, its default
    assert delta["target"] == LINEAR
    some = LLAMA_FACTORY.replace("lora_target: all", "lora_target: q_proj, v_proj\nlora_alpha: 4\npissa_init: true")
    (delta,) = printed(finding(some, "c.yaml"))["deltas"]
    assert delta["params"] == {"rank": 8, "alpha": 4, "init": "pissa", "svd_iterations": 16}
    assert delta["target"] == {"path": ["**.q_proj", "**.v_proj"]}


@pytest.mark.parametrize("text", [
    AXOLOTL.replace("adapter: lora\n", ""),
    LLAMA_FACTORY.replace("finetuning_type: lora", "finetuning_type: full"),
])  # fmt: skip
def test_what_trains_no_delta_has_no_spec(text):
    assert "as a spec" not in (finding(text, "config.yaml").suggestion or "")


@pytest.mark.parametrize("data, name", [
    ({"config": {"architecture": "lora"}, "model_class": "BertModel", "version": "adapters.1.3.0"}, "AdapterHub"),
    ({"delta_type": "lora", "lora_r": 8, "modified_modules": ["q"], "opendelta_version": "0.3.2"}, "OpenDelta"),
])  # fmt: skip
def test_libraries_whose_weights_say_the_rest(data, name):
    found = finding(json.dumps(data), "adapter_config.json")
    assert found.message == f"this is an {name} configuration: deltaspec convert DIRECTORY -o OUT reads it"


def test_axolotl_has_no_rank_or_alpha_of_its_own():
    found = finding(AXOLOTL.replace("lora_r: 32\n", ""), "config.yaml")
    assert found.suggestion == "it has no lora_r, which Axolotl and a spec of it need"


def test_the_directory_is_named_where_it_is_known(tmp_path: Path):
    (tmp_path / "my adapter").mkdir()
    file = tmp_path / "my adapter" / "adapter_config.json"
    file.write_text(json.dumps({"peft_type": "LORA", "target_modules": ["q_proj"]}))
    (found,) = deltaspec.validate(file)
    assert found.message.endswith(f": deltaspec convert '{file.parent}' -o OUT reads it")
    assert printed(found)["deltas"][0]["params"] == {"rank": 8, "alpha": 8}


@pytest.mark.parametrize("name", ["llama", "bert"])
def test_a_model_s_configuration_is_told_as_one(name, tmp_path: Path):
    base(name).config.save_pretrained(tmp_path)  # type: ignore[operator, union-attr]
    (found,) = deltaspec.validate(tmp_path / "config.json")
    assert (found.code, found.message) == ("DS226", "this is a model's configuration, not a spec")
    assert f"deltaspec tree {tmp_path} shows them" in (found.suggestion or "")


def test_a_spec_is_never_taken_for_one():
    spec = {"deltaspec": 1, "deltas": [{"name": "a", "method": "lora", "target": "**.q"}]}
    for key in ("peft_type", "base_model", "model_name_or_path", "delta_type"):
        codes = [found.code for found in deltaspec.validate(spec | {key: "x", "adapter": "lora", "stage": "sft"})]
        assert "DS226" not in codes and "DS201" in codes
    assert [found.code for found in deltaspec.validate({})] != ["DS226"]


OPTIONS: dict[str, dict[str, Any]] = {
    "suffixes": {"target_modules": ["q_proj", "v_proj"]},
    "regex": {"target_modules": r".*\.layers\.1\..*(q|up)_proj"},
    "layers": {"target_modules": ["q_proj"], "layers_to_transform": [1]},
    "all": {"target_modules": "all-linear"},
    "all but": {"target_modules": "all-linear", "exclude_modules": ["v_proj"]},
    "ranks": {"target_modules": ["q_proj", "v_proj"], "rank_pattern": {"q_proj": 3}, "alpha_pattern": {"1.*v_proj": 5}},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_the_spec_of_a_lora_has_the_places_and_ranks_of_peft(name, tmp_path: Path):
    options = LoraConfig(r=4, lora_alpha=6, **OPTIONS[name])
    options.save_pretrained(tmp_path)
    text = (tmp_path / "adapter_config.json").read_text()
    planned = deltaspec.plan(base("llama"), printed(finding(text, "adapter_config.json")))
    ours = {site.fqn: (site.params.rank, site.params.scale) for site in planned["default"].sites}
    with warnings.catch_warnings(action="ignore"):
        layers = get_peft_model(llama(), options).base_model.model.named_modules()
    theirs = {key: (m.r["default"], m.scaling["default"]) for key, m in layers if getattr(m, "r", {})}
    assert ours == theirs


def test_a_type_of_peft_that_has_no_method_here_is_said_to_have_none():
    found = finding(json.dumps({"peft_type": "SHIRA", "r": 4, "target_modules": ["q_proj"]}), "adapter_config.json")
    assert found.message == 'this is a PEFT configuration of type "SHIRA", which deltaspec cannot read'
    assert "merge_and_unload" in (found.suggestion or "")


def test_a_target_of_two_deltas_is_written_twice():
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["query"], "bias": "lora_only"}
    suggestion = finding(json.dumps(config), "adapter_config.json").suggestion or ""
    assert suggestion.count("target: {path: ['**.query']}") == 2 and "&" not in suggestion
