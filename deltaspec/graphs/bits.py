"""Masks of dropout in bits: a byte holds eight truth values."""

from __future__ import annotations

import torch
from torch import Tensor

_GATHER, _SPREAD = 0x0102040810204080, 0x0101010101010101
_ONE_EACH, _CARRY = -0x7FBFDFEFF7FBFDFF, 0x7F7F7F7F7F7F7F7F  # 0x8040201008040201 as a signed number


def packed(mask: Tensor) -> Tensor:
    """Return truth values as bits, eight in a byte; as they are where their number is no multiple of eight."""
    if mask.numel() % 8 or not mask.is_contiguous():
        return mask
    eight = mask.reshape(-1).view(torch.int64)  # each a byte of 0 or 1
    return (eight * _GATHER >> 56).to(torch.uint8)


def unpacked(bits: Tensor, shape: torch.Size) -> Tensor:
    """Return the truth values of `packed`."""
    if bits.dtype is torch.bool:
        return bits
    eight = bits.to(torch.int64).mul_(_SPREAD).bitwise_and_(_ONE_EACH).add_(_CARRY)
    return eight.bitwise_right_shift_(7).bitwise_and_(_SPREAD).view(torch.bool).view(shape)
