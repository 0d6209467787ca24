"""`c.verify`: the answers of now beside those that were kept."""

from __future__ import annotations

import golden_set
import pytest
import torch
from tiny_models import base

import deltaspec
from deltaspec.diagnostics.findings import DeltaSpecError, UnknownDeltaError


def test_a_restored_model_gives_the_same_numbers_and_stays_as_it_was(tmp_path):
    golden_set.save(tmp_path)
    again = deltaspec.restore(base("llama"), tmp_path)
    again.only({"bias": 0.5})
    found = again.verify(tmp_path)
    assert found and [each.absolute for each in found] == [0.0, 0.0] and dict(again.strengths) == {"bias": 0.5}
    assert [each.name for each in again.verify(tmp_path, "bias")] == ["bias"]


def test_a_delta_that_was_changed_differs_and_one_that_does_nothing_is_the_base(tmp_path):
    compiled = golden_set.save(tmp_path)
    with torch.no_grad():
        for parameter in compiled.deltas["low"].parameters():
            parameter.mul_(1.5)
        for parameter in compiled.deltas["bias"].parameters():
            parameter.zero_()
    assert [each.verdict for each in compiled.verify(tmp_path)] == ["differs", "as without the delta"]
    assert compiled.verify(tmp_path, "low", tolerance=10)


def test_half_precision_has_its_own_tolerance(tmp_path):
    golden_set.save(tmp_path)
    half = deltaspec.restore(base("llama", torch.bfloat16), tmp_path)
    found = half.verify(tmp_path)
    assert found and {each.dtype for each in found} == {"bfloat16"} and all(each.absolute > 0 for each in found)
    assert not half.verify(tmp_path, tolerance=1e-6)


def test_without_golden_answers_there_is_nothing_to_compare(tmp_path):
    compiled = golden_set.build()
    compiled.save(tmp_path)
    with pytest.raises(DeltaSpecError) as raised:
        compiled.verify(tmp_path)
    assert [finding.code for finding in raised.value.diagnostics] == ["DS551", "DS551"]
    with pytest.raises(UnknownDeltaError):
        compiled.verify(tmp_path, "nope")
