"""OpenDelta's names of modules: ends, `[r]` regexes and common structures."""

from __future__ import annotations

import pytest
from written_elsewhere import base

from deltaspec.formats.opendelta.addressing import addressed, in_common, structures
from deltaspec.names.patterns import PatternError

BERT = [name for name, _ in base("opendelta", "bert", "BertForSequenceClassification").named_modules() if name]
WITHIN = structures({"": "BertForSequenceClassification", "bert": "BertModel"})


@pytest.mark.parametrize(
    ("patterns", "common", "expected"),
    [
        (["query"], False, ["bert.encoder.layer.0.attention.self.query", "bert.encoder.layer.1.attention.self.query"]),
        (["uery"], False, []),
        (["0.attention"], False, ["bert.encoder.layer.0.attention"]),
        ([r"[r]layer\.1.*\.dense"], False,
         ["bert.encoder.layer.1.attention.output.dense", "bert.encoder.layer.1.intermediate.dense",
          "bert.encoder.layer.1.output.dense"]),
        ([r"[r]\d\.output"], False, ["bert.encoder.layer.0.output", "bert.encoder.layer.1.output"]),
        (["1.attn@.v@"], True, ["bert.encoder.layer.1.attention.self.value"]),
        (["attn@"], True, ["bert.encoder.layer.0.attention", "bert.encoder.layer.1.attention"]),
        ([r"[r]block@\.0\.ff@\.w\d@"], True,
         ["bert.encoder.layer.0.intermediate.dense", "bert.encoder.layer.0.output.dense"]),
        (["attention"], True, []),
    ],
)  # fmt: skip
def test_addressed(patterns: list[str], common: bool, expected: list[str]) -> None:
    assert addressed(BERT, patterns, ["lm_head"], WITHIN if common else {}) == expected


def test_excluded_by_their_beginning() -> None:
    assert addressed(BERT, ["dense"], ["bert.encoder"], {}) == ["bert.pooler.dense"]


def test_second_name_of_a_place_that_a_model_lacks() -> None:
    opt = structures({"": "OPTForCausalLM", "model": "OPTModel"})
    assert in_common("model.decoder.layers.3.fc1", opt) == [
        "model.decoder@.block@.3.ff@.w1@", "model.decoder@.block@.3.ff@",
    ]  # fmt: skip
    assert addressed(["model.decoder.layers.3.fc2"], ["ff@"], [], opt) == ["model.decoder.layers.3.fc2"]
    assert in_common("model.decoder.embed_tokens", opt) == ["model.decoder@.embed_tokens"]  # its decoder is met first


def test_no_regular_expression() -> None:
    with pytest.raises(PatternError):
        addressed(BERT, ["[r]("], [], {})
