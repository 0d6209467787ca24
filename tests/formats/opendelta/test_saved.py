"""OpenDelta directories that were cut, mixed, or say what nothing here knows."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from written_elsewhere import base_of, copied, try_wrong_values

import deltaspec
from deltaspec.diagnostics.findings import DeltaSpecError
from deltaspec.formats.base import Base
from deltaspec.formats.opendelta.saved import CONFIG
from deltaspec.formats.opening import open_set

Change = Callable[[dict[str, Any], dict[str, Any]], object]
LAYER = "bert.encoder.layer.1.attention.self.query.lora."

CHANGES: dict[str, tuple[Change, str, str]] = {
    "a layer is cut": (lambda c, w: [w.pop(k) for k in list(w) if k.startswith(LAYER)], "DS543", "query"),
    "half a pair is cut": (lambda c, w: w.pop(LAYER + "lora_B"), "DS543", "has no .*lora_B"),
    "another rank": (lambda c, w: c.update(lora_r=8), "DS526", "lora_A has the shape"),
    "fewer modules are meant": (lambda c, w: c.update(modified_modules=["attn@.v@"]), "DS543", "does not mean"),
    "an unknown type": (lambda c, w: c.update(delta_type="lorra"), "DS545", "lorra"),
    "an unknown option": (lambda c, w: c.update(rotations=3), "DS544", "rotations"),
    "no number": (lambda c, w: c.update(lora_alpha="much"), "DS544", "lora_alpha"),
    "no regular expression": (lambda c, w: c.update(modified_modules=["[r]("]), "DS544", "no regular expression"),
    "a key of nothing": (lambda c, w: w.update({"classifier.extra": torch.ones(3)}), "DS543", "fits nowhere"),
    "a head of another size": (lambda c, w: w.update({"classifier.bias": torch.ones(4)}), "DS526", "classifier.bias"),
    "a second one": (
        lambda c, w: w.update({k.replace(".lora.", ".lora_1."): v for k, v in list(w.items())}), "DS538", "second lora",
    ),
    "another model's": (
        lambda c, w: [w.update({k.replace("query", "queries"): w.pop(k)}) for k in list(w)], "DS523", "another model",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CHANGES)
def test_refused(name: str, tmp_path: Path) -> None:
    change, code, said = CHANGES[name]
    folder = copied("opendelta", "lora_bert_head", tmp_path)
    config, weights = json.loads((folder / "config.json").read_text()), torch.load(folder / "pytorch_model.bin")
    change(config, weights)
    (folder / "config.json").write_text(json.dumps(config))
    torch.save(weights, folder / "pytorch_model.bin")
    with pytest.raises(DeltaSpecError, match=said) as caught:
        deltaspec.restore(base_of("opendelta", "lora_bert_head"), folder)
    assert code in {finding.code for finding in caught.value.diagnostics}


def test_rules_that_were_not_trained_are_not_in_the_file(tmp_path: Path) -> None:
    folder = copied("opendelta", "compacter_gpt2_n2", tmp_path)
    weights = torch.load(folder / "pytorch_model.bin")
    torch.save({k: v for k, v in weights.items() if "phm_rule" not in k}, folder / "pytorch_model.bin")
    with pytest.raises(DeltaSpecError, match="learn_phm") as caught:
        deltaspec.restore(base_of("opendelta", "compacter_gpt2_n2"), folder)
    assert {finding.code for finding in caught.value.diagnostics} == {"DS538"}


def test_scale_that_no_spec_has_is_multiplied_out(tmp_path: Path) -> None:
    folder = copied("opendelta", "lora_bert_head", tmp_path)
    config = json.loads((folder / "config.json").read_text()) | {"lora_alpha": -2}
    (folder / "config.json").write_text(json.dumps(config))
    model = base_of("opendelta", "lora_bert_head")
    found = deltaspec.restore(model, folder).merge().get_parameter("bert.encoder.layer.0.attention.self.query.weight")
    weights = torch.load(folder / "pytorch_model.bin")
    down, up = (weights[f"bert.encoder.layer.0.attention.self.query.lora.lora_{f}"] for f in "AB")
    plain = model.get_parameter("bert.encoder.layer.0.attention.self.query.weight")
    torch.testing.assert_close(found, plain - 2 / 4 * up @ down)


def test_factors_that_do_not_fit_one_another(tmp_path: Path) -> None:
    folder = copied("opendelta", "compacter_gpt2_n2", tmp_path)
    weights = torch.load(folder / "pytorch_model.bin")
    key = next(key for key in weights if key.endswith("W_left"))
    weights[key] = torch.cat([weights[key], weights[key]], dim=2)
    torch.save(weights, folder / "pytorch_model.bin")
    with pytest.raises(DeltaSpecError, match="do not fit one another"):
        deltaspec.restore(base_of("opendelta", "compacter_gpt2_n2"), folder)


def last_hidden(model: Any) -> torch.Tensor:
    found: torch.Tensor = model(input_ids=torch.arange(3, 12)[None], output_hidden_states=True).hidden_states[-1]
    return found


def test_what_was_trained_beside_it_is_found_under_another_prefix(tmp_path: Path) -> None:
    folder, head = copied("opendelta", "lora_bert_head", tmp_path), base_of("opendelta", "lora_bert_head")
    held = torch.load(folder / "pytorch_model.bin")
    norms = {name: value + 0.5 for name, value in head.state_dict().items() if "LayerNorm" in name}
    with_head = {**{key: value for key, value in held.items() if "classifier" not in key}, **norms}
    found = []
    for saved in (with_head, {key.removeprefix("bert."): value for key, value in with_head.items()}):
        torch.save(saved, folder / "pytorch_model.bin")
        found += [last_hidden(deltaspec.restore(model, folder)) for model in (head, head.bert)]
    assert all(torch.equal(found[0], other) for other in found[1:])
    torch.save(held | norms, folder / "pytorch_model.bin")
    with pytest.raises(deltaspec.DeltaSpecError) as caught:
        deltaspec.restore(head.bert, folder)
    (finding,) = caught.value.diagnostics
    assert finding.code == "DS523" and "classifier.{weight,bias}" in finding.message
    assert finding.suggestion == "load BertForSequenceClassification"


READ = {
    "lora_bert_head": ("lora_r", "lora_alpha", "lora_dropout", "modified_modules", "exclude_modules", "delta_type"),
    "parallel_bert": ("bottleneck_dim", "non_linearity", "modified_modules", "scaled", "common_structure"),
    "compacter_gpt2_n2": ("hypercomplex_division", "non_linearity", "shared_phm_rule"),
    "prefix_bert": ("prefix_token_num", "modified_modules"),
    "soft_gpt2": ("soft_token_num", "other_expand_ids"),
}
"""Options that a reader asks for, by case."""


def rewritten(folder: Path, whole: dict[str, Any], **config: Any) -> None:
    (folder / CONFIG).write_text(json.dumps({**whole, **config}))


@pytest.mark.parametrize("case", READ)
def test_any_value_is_read_or_is_a_finding(case: str, tmp_path: Path) -> None:
    folder = copied("opendelta", case, tmp_path)
    whole = json.loads((folder / CONFIG).read_text())
    try_wrong_values("opendelta", case, folder, READ[case], partial(rewritten, folder, whole))


@pytest.mark.parametrize(
    ("case", "options", "said"),
    [
        ("lora_bert_head", {"lora_dropout": 5}, "dropout must be less than 1"),
        ("lora_bert_head", {"lora_alpha": -1e300}, "lora_alpha: -1e+300 is not a number"),
        ("lora_bert_head", {"a_new_one": 3}, "a_new_one: 3 is no option"),
        ("parallel_bert", {"modified_modules": ["attention"]}, "are no pairs"),
        ("parallel_bert", {"modified_modules": ["[r](", "x"]}, "modified_modules cannot be used"),
    ],
)
def test_the_finding_is_about_the_configuration(case: str, options: Any, said: str, tmp_path: Path) -> None:
    folder = copied("opendelta", case, tmp_path)
    rewritten(folder, json.loads((folder / CONFIG).read_text()), **options)
    with pytest.raises(deltaspec.DeltaSpecError) as caught:
        open_set(folder, lambda: Base(base_of("opendelta", case)))
    assert all(finding.suggestion for finding in caught.value.diagnostics)
    assert {finding.code for finding in caught.value.diagnostics} == {"DS544"} and said in str(caught.value)
