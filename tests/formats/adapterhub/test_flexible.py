"""Flexible heads of AdapterHub come in as the head of a class of transformers that computes the same."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn
from written_elsewhere import FIXTURES, base, base_of, copied, difference, inputs, refuse

import deltaspec
from deltaspec.diagnostics.findings import DeltaSpecError
from deltaspec.formats.adapterhub import flexible
from deltaspec.formats.adapterhub.reader import base_of as named_base_of

TABLE = json.loads((Path(flexible.__file__).parent / "flexible_heads.json").read_text())
KINDS = {kind: TABLE.get(data.get("as"), data)["heads"] for kind, data in TABLE.items()}
CASES = [
    (kind, number, TABLE[kind]["class"] + head["class"])
    for kind, heads in KINDS.items()
    for number, head in enumerate(heads)
]
Change = Callable[[dict[str, Any], dict[str, Any]], object]

CHANGES: dict[str, tuple[Change, str, str]] = {
    "other labels": (lambda c, w: c.update(num_labels=4), "DS526", "4 labels, and this .* has 3"),
    "a bias is cut": (lambda c, w: w.pop("heads.task.4.bias"), "DS543", "has no heads.task.4.bias"),
    "no last layer": (lambda c, w: c.update(bias=w.pop("heads.task.4.weight") is None), "DS543", "heads.task.4.weight"),
    "a layer more": (lambda c, w: w.update({"heads.task.7.bias": torch.ones(3)}), "DS549", "heads.task.7.bias"),
    "another activation": (lambda c, w: c.update(activation_function="relu"), "DS549", "2 layers with relu"),
    "another type": (lambda c, w: c.update(head_type="dependency_parsing"), "DS549", "dependency_parsing"),
    "another class's": (lambda c, w: c.update(head_type="tagging", layers=1), "DS523", "none of the same"),
    "an unknown option": (lambda c, w: c.update(temperature=3), "DS544", "temperature"),
    "an option of another kind": (lambda c, w: c.update(layers="two"), "DS544", "layers"),
}  # fmt: skip


def changed(change: Change, folder: Path) -> Path:
    """Change what a flexible head is said to be, and its weights."""
    config, weights = (
        json.loads((folder / "head_config.json").read_text()),
        torch.load(folder / "pytorch_model_head.bin"),
    )
    change(config["config"], weights)
    (folder / "head_config.json").write_text(json.dumps(config))
    torch.save(weights, folder / "pytorch_model_head.bin")
    return folder


@pytest.mark.parametrize(("kind", "number", "name"), CASES)
def test_places(kind: str, number: int, name: str) -> None:
    """Each place of each class is there, and is what AdapterHub's layer at that place is."""
    said, few = KINDS[kind][number], {"num_hidden_layers": 1, "num_layers": 1, "encoder_layers": 1, "decoder_layers": 1}
    with torch.device("meta"):
        model = getattr(transformers, name)(transformers.AutoConfig.for_model(kind, **few))
    norm, bias = said.get("layer_norm", False), said.get("bias", True)
    head = flexible.Head(said["types"][0], said["layers"], "tanh", False, norm, bias, None)
    assert len(head.keys("task")) == len(said["places"])
    modules = [model.get_submodule(place) for place in said["places"]]
    assert [isinstance(module, nn.LayerNorm) for module in modules] == [norm and i == 1 for i in range(len(modules))]
    assert (modules[-1].bias is not None) == bias
    if "inverse" in said:
        assert isinstance(model.get_submodule(said["inverse"]), nn.Module)


@pytest.mark.parametrize("case", ["head_flex_bert", "head_flex_bert_mlm_inv"])
def test_logits(case: str) -> None:
    """The second one runs the inverse of its invertible adapter before the last layer of its head."""
    assert difference("adapterhub", case) < 5e-5


def test_classifier_on_the_first_token() -> None:
    given, expected = inputs("adapterhub", "head_flex_roberta_cls1")
    folder = FIXTURES / "adapterhub" / "head_flex_roberta_cls1" / "adapter"
    compiled = deltaspec.restore(base_of("adapterhub", "head_flex_roberta_cls1"), folder)
    with torch.no_grad():
        torch.testing.assert_close(compiled(**given).logits[:, 0], expected, atol=5e-5, rtol=0)


def test_last_layer_without_bias(tmp_path: Path) -> None:
    def without(config: dict[str, Any], weights: dict[str, Any]) -> None:
        config["bias"] = False
        weights["heads.task.4.bias"].zero_()

    folder = changed(without, copied("adapterhub", "head_flex_bert", tmp_path))
    with_zeros = changed(lambda c, w: c.update(bias=True), copied("adapterhub", "head_flex_bert", tmp_path / "other"))
    changed(lambda c, w: w["heads.task.4.bias"].zero_(), with_zeros)
    changed(lambda c, w: w.pop("heads.task.4.bias"), folder)
    model, (given, _) = base_of("adapterhub", "head_flex_bert"), inputs("adapterhub", "head_flex_bert")
    found = [deltaspec.restore(model, one)(**given).logits for one in (folder, with_zeros)]
    assert torch.equal(*found)


@pytest.mark.parametrize("name", CHANGES)
def test_refused(name: str, tmp_path: Path) -> None:
    change, code, said = CHANGES[name]
    refuse(
        "adapterhub", "head_flex_bert", changed(change, copied("adapterhub", "head_flex_bert", tmp_path)), code, said
    )


@pytest.mark.parametrize(
    ("case", "kind", "load"),
    [
        ("head_flex_bert", "BertModel", "load BertForSequenceClassification with num_labels=3"),
        ("head_flex_bert_mlm_inv", "BertForSequenceClassification", "load BertForMaskedLM;"),
    ],
)
def test_class_to_load(case: str, kind: str, load: str) -> None:
    with pytest.raises(DeltaSpecError, match=load) as caught:
        deltaspec.restore(base("adapterhub", "bertbare", kind), FIXTURES / "adapterhub" / case / "adapter")
    assert {finding.code for finding in caught.value.diagnostics} == {"DS523"}


def test_class_that_is_loaded() -> None:
    wanted = named_base_of(FIXTURES / "adapterhub" / "head_flex_bert" / "adapter")[1]
    assert (wanted.kind, wanted.settings) == ("BertForSequenceClassification", {"num_labels": 3})


def test_labels(tmp_path: Path) -> None:
    """Names that the model lacks are said; two orders of them are refused."""
    names = {"no": 0, "perhaps": 1, "yes": 2}
    folder = changed(lambda c, w: c.update(label2id=names), copied("adapterhub", "head_flex_bert", tmp_path))
    deltaspec.restore(base_of("adapterhub", "head_flex_bert"), folder)
    model = copy.deepcopy(base_of("adapterhub", "head_flex_bert"))
    model.config.label2id = {"yes": 0, "perhaps": 1, "no": 2}
    with pytest.raises(DeltaSpecError, match="load the base model with id2label") as caught:
        deltaspec.restore(model, folder)
    assert {finding.code for finding in caught.value.diagnostics} == {"DS587"}
