"""The low-rank update of a mixed batch without autograd, as an operator of torch: `deltaspec::add_low_rank_rows_`.

On a processor, products of each delta's rows with its own matrices, whatever their ranks, cost less than to gather and
pad those for one batched product. To the dispatcher, and to what listens to it, they are one call a site.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

_LIBRARY = torch.library.Library("deltaspec", "DEF")  # type: ignore[no-untyped-call]
_LIBRARY.define(  # type: ignore[no-untyped-call]
    "add_low_rank_rows_(Tensor(a!) y, Tensor x, Tensor[] downs, Tensor[] ups, int[] tokens, int[] places, "
    "float[] factors) -> ()"
)


def _add_low_rank_rows_(
    y: Tensor,
    x: Tensor,
    downs: Sequence[Tensor],
    ups: Sequence[Tensor],
    tokens: Sequence[int],
    places: Sequence[int],
    factors: Sequence[float],
) -> None:
    """Add factor · (x downᵀ) upᵀ, run by run, to `y` `[tokens, out]`; `x` is `[tokens, in]`.

    A run are so many neighbouring tokens under the delta at a place, from 1; at place 0 nothing is added.
    """
    for after, entered, place, factor in zip(_split(y, tokens), _split(x, tokens), places, factors, strict=True):
        if not place:
            continue
        down, up = downs[place - 1], ups[place - 1]
        if len(entered) == 1:
            after[0].addmv_(up, down.mv(entered[0]), alpha=factor)
        else:
            after.addmm_(entered.mm(down.t()), up.t(), alpha=factor)


def _split(x: Tensor, tokens: Sequence[int]) -> tuple[Tensor, ...]:
    found: tuple[Tensor, ...] = torch.split(x, tokens)  # type: ignore[arg-type]
    return found


_LIBRARY.impl("add_low_rank_rows_", _add_low_rank_rows_, "CPU")  # type: ignore[no-untyped-call]


def add_low_rank_rows_(y: Tensor, x: Tensor, downs: list[Tensor], ups: list[Tensor], runs: Any) -> Tensor:
    """Add to y `[rows, tokens, out]`, in place, factor · (x downᵀ) upᵀ of each row's own; see `row_update.Runs`."""
    each = x.shape[1]
    tokens = [(end - begin) * each for begin, end, _, _ in runs]
    given = [place for _, _, place, _ in runs], [factor for _, _, _, factor in runs]
    torch.ops.deltaspec.add_low_rank_rows_.default(y.flatten(0, 1), x.flatten(0, 1), downs, ups, tokens, *given)
    return y
