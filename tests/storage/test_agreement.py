"""When two computations agree, and what is said where they do not."""

from __future__ import annotations

import pytest
import torch

from deltaspec.storage.agreement import TOLERANCES, Verification, agreement, coarser

EXPECTED = torch.tensor([[[4.0, 1.0, 0.0], [0.0, 3.0, 1.0]]])
BASE = torch.tensor([[[1.0, 2.0, 0.0], [0.0, 1.0, 3.0]]])


def compared(found, dtype="float32", **rest):
    return agreement({"d": 1.0}, EXPECTED, BASE, found, dtype=dtype, **rest)


@pytest.mark.parametrize("dtype", TOLERANCES)
def test_rounding_of_the_dtype_is_let_pass_and_no_more(dtype):
    limit = TOLERANCES[dtype] * 4
    assert compared(EXPECTED.double() + limit * 0.9, dtype).verdict == "same"
    wrong = compared(EXPECTED.double() + limit * 1.1, dtype)
    assert wrong.verdict == "differs" and wrong.absolute == pytest.approx(1.1 * limit)
    assert wrong.relative == pytest.approx(1.1 * limit / 4)


def test_answers_of_the_base_are_told_even_within_the_tolerance():
    there = compared(BASE)
    assert there.verdict == "as without the delta" and there.argmax == 0.0
    assert compared(BASE, tolerance=10).verdict == "as without the delta"
    assert "the delta is not at work there" in str(Verification([there]).findings[0])


def test_padding_does_not_count():
    mask = torch.tensor([[True, False]])
    found = EXPECTED.clone()
    found[0, 1] = 7
    assert compared(found, mask=mask).verdict == "same" and compared(found).verdict == "differs"


def test_what_is_no_number_differs_and_masked_logits_do_not():
    assert compared(EXPECTED * float("nan")).absolute == float("inf")
    assert compared(EXPECTED[..., :2]).verdict == "differs"
    inf = EXPECTED.clone()
    inf[..., 2] = -float("inf")
    assert agreement({}, inf, BASE, inf, dtype="float32").verdict == "same"


def test_a_verification_is_a_table_and_true_where_all_agree():
    right, wrong = compared(EXPECTED), compared(EXPECTED + 1)
    assert Verification([right]) and not Verification([right, wrong])
    text = str(Verification([right, wrong]))
    assert text.splitlines()[0].split() == ["deltas", "max", "abs", "max", "rel", "argmax", "verdict"]
    assert text.splitlines()[2].split() == ["d", "1", "0.25", "100.0%", "differs"]
    assert "0.0001 (float32)" in text.splitlines()[3]
    assert [finding.code for finding in Verification([right, wrong]).findings] == ["DS552"]
    assert coarser("float32", "bfloat16", "float16") == "bfloat16"
