"""Masks in bits."""

from __future__ import annotations

import pytest
import torch

from deltaspec.graphs.bits import packed, unpacked


@pytest.mark.parametrize("shape", [(8,), (3, 16), (5, 7), (1024, 24), (0, 8)])
def test_what_is_packed_comes_back(shape):
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(0)) < 0.5
    bits = packed(mask)
    assert torch.equal(unpacked(bits, mask.shape), mask)
    assert bits.nbytes == (mask.numel() // 8 if mask.numel() % 8 == 0 else mask.numel())


def test_every_byte_comes_back():
    bits = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(packed(unpacked(bits, torch.Size((256, 8)))), bits)
