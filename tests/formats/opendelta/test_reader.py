"""Deltas that OpenDelta saved come in with the logits that it computed, or are refused by name."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from written_elsewhere import FIXTURES, base_of, copied, difference

import deltaspec
from deltaspec.diagnostics.findings import DeltaSpecError

EXACT = (
    "adapter_bert", "bitfit_t5", "compacter_gpt2_n2", "lora_bert_head", "lowrank_t5", "parallel_bert", "parallel_gpt2",
    "prefix_bert", "soft_gpt2",
)  # fmt: skip
REFUSED = {
    "prefix_flat_t5": ("DS549", "relative positions"),
    "two_lora_adapter_bert": ("DS538", "adapter"),
}


@pytest.mark.parametrize("case", EXACT)
def test_logits(case: str) -> None:
    assert difference("opendelta", case) < 5e-5


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case: str) -> None:
    code, said = REFUSED[case]
    with pytest.raises(DeltaSpecError, match=said) as caught:
        deltaspec.restore(base_of("opendelta", case), FIXTURES / "opendelta" / case / "adapter")
    assert [finding.code for finding in caught.value.diagnostics] == [code]


def test_second_configuration_beside(tmp_path: Path) -> None:
    """Two deltas on one model are saved into each directory, and each directory has the configuration of one."""
    case = "two_lora_adapter_bert"
    folder = copied("opendelta", case, tmp_path)
    other = FIXTURES / "opendelta" / case / "adapter_1" / "config.json"
    shutil.copy(other, folder / "config.adapter.json")
    assert json.loads(other.read_text())["delta_type"] == "adapter"
    assert difference("opendelta", case, folder) < 5e-5
