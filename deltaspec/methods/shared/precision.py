"""The precision to compute in, where torch has no kernel for less."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


def single(x: Tensor) -> Tensor:
    """Return a real tensor in float32, if it is narrower: decompositions and transforms have no kernels for those."""
    return x.float() if x.element_size() < 4 else x
