"""Thin factors of wide matrices, of which not all singular values are computed."""

from __future__ import annotations

import pytest
import torch

from deltaspec.folders import low_rank as module
from deltaspec.folders.low_rank import low_rank


@pytest.mark.parametrize(("rank", "error", "expected"), [(None, 1e-3, 90), (8, 0.01, 8), (200, 0.01, 90)])
def test_wide_matrices_are_decomposed_as_far_as_is_needed(monkeypatch, rank, error, expected):
    monkeypatch.setattr(module, "_WHOLE", 100)
    generator = torch.Generator().manual_seed(0)
    matrix = torch.randn(500, 90, generator=generator) @ torch.randn(90, 400, generator=generator)
    state = torch.random.get_rng_state()
    found = low_rank(matrix, rank, error)
    assert torch.equal(state, torch.random.get_rng_state()) and found.rank == expected
    values = torch.linalg.svdvals(matrix.double())
    assert found.error == pytest.approx(float(values[expected:].norm() / values.norm()), abs=2e-3)
    assert torch.equal(low_rank(matrix, rank, error).up, found.up)
