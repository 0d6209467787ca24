"""`convert` takes directories of AdapterHub and OpenDelta: their base's class and labels, its weights where needed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from written_elsewhere import FIXTURES, base_of, inputs

import deltaspec
from deltaspec.backbone.loading import Wanted
from deltaspec.formats.adapterhub import reader as hub
from deltaspec.formats.convert import convert
from deltaspec.formats.opendelta import reader as delta


def test_named_bases() -> None:
    static = FIXTURES / "adapterhub" / "head_static_bert" / "adapter"
    assert hub.base_of(static) == ("tiny/bert", Wanted("BertForSequenceClassification", {"num_labels": 3}))
    assert hub.base_of(FIXTURES / "adapterhub" / "stack_double_gpt2" / "adapter")[0] == "tiny/gpt2"
    t5 = FIXTURES / "opendelta" / "bitfit_t5" / "adapter"
    assert delta.base_of(t5) == ("t5", Wanted("T5ForConditionalGeneration"))


@pytest.mark.parametrize(
    ("library", "case", "base"),
    [("adapterhub", "seq_bn_bert", "bert"), ("opendelta", "lora_bert_head", "bert")],
)
def test_converted(library: str, case: str, base: str, tmp_path: Path) -> None:
    """The norms in front of AdapterHub's bottlenecks come from the base's weights, which are read then."""
    source = FIXTURES / library / case / "adapter"
    convert(source, tmp_path / "out", str(FIXTURES / library / "bases" / base))
    given, expected = inputs(library, case)
    with torch.no_grad():
        found = deltaspec.restore(base_of(library, case), tmp_path / "out")(**given).logits
    torch.testing.assert_close(found, expected, atol=5e-5, rtol=0)
