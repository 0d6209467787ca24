"""What a step is estimated for, and amounts of memory, as people write them."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from deltaspec.diagnostics.findings import DeltaSpecError
from deltaspec.language.conditions import amount, conditions, from_text, shown_amount
from deltaspec.language.load import load


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("≤ 12GiB", 12 * 2**30), ("<= 12 GiB", 12 * 2**30), ("12GB", 12 * 10**9), ("1.5MiB", 3 * 2**19),
        ("800 KB", 800_000), ("512B", 512), ("≤2TiB", 2**41),
    ],
)  # fmt: skip
def test_amounts(text: str, count: int) -> None:
    assert amount(text) == count
    document = {"deltaspec": 1, "deltas": [{"name": "d", "method": "lora"}], "expect": {"memory": text}}
    spec = load(document)
    assert spec.expect is not None and spec.expect.memory is not None and spec.expect.memory.bytes == count
    assert load(spec.to_data()) == spec


@pytest.mark.parametrize(
    ("memory", "code", "said"),
    [
        ("12", "DS208", "not an amount of memory"),
        ("> 12GiB", "DS208", "not an amount of memory"),
        ("12gib", "DS208", "not an amount of memory"),
        (12, "DS203", "must be text or a mapping"),
        ({"batch": 2}, "DS202", 'lacks the key "max"'),
        ({"max": "12GiB", "bacth": 2}, "DS201", "unknown key"),
        ({"max": "12GiB", "batch": 0}, "DS204", "at least 1"),
        ({"max": "12GiB", "optimizer": "adamm"}, "DS205", "knows no value"),
        ({"max": "12 apples"}, "DS208", "not an amount of memory"),
    ],
)
def test_expectations_that_are_none(memory: Any, code: str, said: str) -> None:
    with pytest.raises(DeltaSpecError, match=said) as caught:
        load({"deltaspec": 1, "deltas": [{"name": "d", "method": "lora"}], "expect": {"memory": memory}})
    (finding,) = caught.value.diagnostics
    assert finding.code == code and (finding.suggestion or code in ("DS203", "DS204"))


def test_options_of_a_command_line() -> None:
    found = from_text("batch=8, length=512,optimizer=AdamW-8bit,checkpointing=true,dtype=bf16,deltas=french+legal")
    assert found == conditions(
        {"batch": 8, "length": 512, "optimizer": "adamw_bnb_8bit", "checkpointing": True, "dtype": torch.bfloat16,
         "deltas": ["french", "legal"]}
    )  # fmt: skip
    assert conditions({"optimizer": torch.optim.SGD}).optimizer == "sgd"
    assert from_text("") == conditions({})
    assert from_text("optimizer=sgd+momentum").optimizer == "sgd_momentum"


def test_all_that_is_wrong_at_once() -> None:
    with pytest.raises(DeltaSpecError) as caught:
        from_text("bacth=8,length=x,optimizer=adamm,batch,labels=true,labels=false,batch=0")
    found = {finding.message: finding.suggestion for finding in caught.value.diagnostics}
    assert {finding.code for finding in caught.value.diagnostics} == {"DS506"} and len(found) == 6
    assert "did you mean batch?" in str(found['an estimate has no option "bacth"'])
    assert "did you mean adam" in str(found['optimizer cannot be "adamm"'])


def test_amounts_for_people() -> None:
    assert [shown_amount(count) for count in (512, 1536, 12 * 2**30, 3 * 2**40)] == [
        "512 B", "1.5 KiB", "12.0 GiB", "3.0 TiB",
    ]  # fmt: skip
