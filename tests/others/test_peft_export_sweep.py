"""A slice of the sweep of random deltas written as PEFT adapters; `tests/support/export_sweep.py` runs all of it."""

from __future__ import annotations

from pathlib import Path

import pytest
from export_sweep import differs

AGREE = (0, 2, 4, 5, 11, 12, 13, 15, 17, 24, 28, 31, 32, 33, 38, 45, 46, 47, 56)
"""Seeds whose deltas have a form in PEFT: among them all models, and nearly all methods."""


@pytest.mark.parametrize("seed", AGREE)
def test_peft_and_restore_compute_the_same(seed: int, tmp_path: Path) -> None:
    assert differs(seed, tmp_path / "out") is None


def test_what_peft_has_no_place_for_is_refused(tmp_path: Path) -> None:
    found = differs(27, tmp_path / "out")
    assert found is not None and found.startswith("refused") and "trainable_token_indices" in found
