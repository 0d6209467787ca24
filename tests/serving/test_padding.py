"""Tensors of rows put together, zeros behind those that are smaller."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from deltaspec.serving.padding import Buffer, largest, padded, padded_like

SHAPES = [[(2, 5), (4, 5)], [(5, 2), (5, 1)], [(3, 4), (3, 4)], [(2, 2, 3), (3, 3, 3)], [(1,), (4,)]]


@pytest.mark.parametrize("shapes", SHAPES, ids=str)
def test_values_stay_and_zeros_follow(shapes):
    parts = [None, *(torch.randn(shape) for shape in shapes), torch.randn(shapes[0])]
    whole, zeros = largest(shapes), dict[Any, Any]()
    for _ in range(2):  # the second time with the zeros of the first
        found = padded(parts, whole, parts[1], zeros)
        assert found.shape == (len(parts), *whole) and not found[0].any()
        for row, part in zip(found[1:], parts[1:], strict=True):
            assert torch.equal(row[tuple(map(slice, part.shape))], part)
            assert row.abs().sum().isclose(part.abs().sum())
    buffer = Buffer(len(parts), shapes, parts[1])
    buffer.rows.fill_(torch.nan)
    buffer.fill(parts, zeros)
    assert torch.equal(buffer.rows, found)
    assert len(whole) < 2 or torch.equal(buffer.transposed, found.mT)


def test_last_dimensions_are_padded_at_their_ends():
    assert padded_like(torch.ones(2, 1, 2), (2, 3)).tolist() == [[[1, 1, 0], [0, 0, 0]]] * 2
