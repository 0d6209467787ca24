"""Options of OpenDelta configurations that are not what they may be: findings, and never another delta."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from written_elsewhere import base_of, copied

import deltaspec
from deltaspec.formats.base import Base
from deltaspec.formats.opendelta.saved import CONFIG
from deltaspec.formats.opening import open_set

WRONG: tuple[Any, ...] = ("x", [[]], {"a": {"b": [1]}}, -1e300, 10**400, float("nan"))
READ = {
    "lora_bert_head": ("lora_r", "lora_alpha", "lora_dropout", "modified_modules", "exclude_modules", "delta_type"),
    "parallel_bert": ("bottleneck_dim", "non_linearity", "modified_modules", "scaled", "common_structure"),
    "compacter_gpt2_n2": ("hypercomplex_division", "non_linearity", "shared_phm_rule"),
    "prefix_bert": ("prefix_token_num", "modified_modules"),
    "soft_gpt2": ("soft_token_num", "other_expand_ids"),
}
"""Options that a reader asks for, by case."""


@pytest.mark.parametrize("case", READ)
def test_any_value_is_read_or_is_a_finding(case: str, tmp_path: Path) -> None:
    folder, plain = copied("opendelta", case, tmp_path), Base(base_of("opendelta", case))
    whole = json.loads((folder / CONFIG).read_text())
    for name in READ[case]:
        for value in WRONG:
            (folder / CONFIG).write_text(json.dumps({**whole, name: value}))
            try:
                open_set(folder, lambda: plain)
            except deltaspec.DeltaSpecError as error:
                assert all(finding.suggestion for finding in error.diagnostics)
            except Exception as error:
                pytest.fail(f"{name}: {value!r}: {error!r}")


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
    whole = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps({**whole, **options}))
    with pytest.raises(deltaspec.DeltaSpecError) as caught:
        open_set(folder, lambda: Base(base_of("opendelta", case)))
    assert all(finding.suggestion for finding in caught.value.diagnostics)
    assert {finding.code for finding in caught.value.diagnostics} == {"DS544"} and said in str(caught.value)
