"""Fuse the two low-rank products of a mixed batch with the addition after them: one call a site instead of four.

Each row has matrices of its own, so these are batched products; on a processor, where ranks differ or one delta has
many rows, products of each delta by itself. The wide one is accumulated into the host's output where that is a new
tensor which nothing else holds; strengths are multiplied in only where some row has one. What is gathered goes into
buffers that the sites of a forward share, which so stay in the processor's cache.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from deltaspec.graphs import row_operator
from deltaspec.graphs.passes.scope import Scope
from deltaspec.graphs.row_ops import (
    RowNumber,
    RowSlot,
    RowSource,
    add_linear_rows,
    linear_rows,
    rows_in,
    rows_out,
    scaled_rows,
    take,
)  # fmt: skip
from deltaspec.graphs.row_update import RowUpdate, Runs

_MANY = 4
"""Tokens a row from which the narrow product is faster as `down xᵀ` than as `x downᵀ` (measured with MKL, float32)."""

_is_transformed = torch._C._are_functorch_transforms_active


def add_low_rank_rows(
    y: Tensor, x: Tensor, down: RowSource, up: RowSource, slot: RowSlot, number: RowNumber | float
) -> Tensor:
    """Return, row by row, y + strength · factor · (x downᵀ) upᵀ. `y` is `[rows, …, out]`, `x` `[rows, …, in]`."""
    return _add(y, x, down, up, slot, number, overwrite=False)


def add_low_rank_rows_(
    y: Tensor, x: Tensor, down: RowSource, up: RowSource, slot: RowSlot, number: RowNumber | float
) -> Tensor:
    """Return, row by row, y + strength · factor · (x downᵀ) upᵀ; `y` may be overwritten."""
    return _add(y, x, down, up, slot, number, overwrite=True)


def _add(
    y: Tensor, x: Tensor, down: RowSource, up: RowSource, slot: RowSlot, number: RowNumber | float, overwrite: bool
) -> Tensor:
    if torch.compiler.is_compiling() or _is_transformed() or not x.dim() == y.dim() == 3:
        return _plain(y, x, down, up, slot, number)
    if slot.empty:
        return y
    size, with_grad = x.shape[0], torch.is_grad_enabled()
    if x.is_cpu and (with_grad or slot.is_various(size)) and not torch.is_autocast_enabled("cpu"):
        downs, ups = down.own(slot), up.own(slot)
        if all(_is_own(tensor, y.dtype) for tensor in (y, x, *downs, *ups)):
            return _separate(y, x, downs, ups, _runs(slot, size, number), overwrite and not with_grad)
    if with_grad:
        return _plain(y, x, down, up, slot, number)
    (first, first_t), (_, second_t) = down.take_briefly(slot, size), up.take_briefly(slot, size)
    h = torch.bmm(first, x.mT).mT if x.shape[1] >= _MANY else torch.bmm(x, first_t)
    if h.dtype is y.dtype and second_t.dtype is y.dtype:  # not so under autocast
        h, scale = scaled_rows(h, slot, number)
        if overwrite and y.is_contiguous():
            return y.baddbmm_(h, second_t, alpha=scale)
        return torch.baddbmm(y, h, second_t, alpha=scale)
    return _plain(y, x, down, up, slot, number)


def _separate(y: Tensor, x: Tensor, downs: list[Tensor], ups: list[Tensor], runs: Runs, overwrite: bool) -> Tensor:
    """Compute it delta by delta: on a processor that is cheaper than to gather matrices, and to pad them."""
    if torch.is_grad_enabled():
        found: Tensor = RowUpdate.apply(y, x, runs, *downs, *ups)  # type: ignore[no-untyped-call]
        return found
    if not overwrite or not y.is_contiguous():
        y = y.clone(memory_format=torch.contiguous_format)
    return row_operator.add_low_rank_rows_(y, x, downs, ups, runs)


def _runs(slot: RowSlot, size: int, number: RowNumber | float) -> Runs:
    if isinstance(number, float):
        return tuple((begin, end, place, strength * number) for begin, end, place, strength in slot.runs(size))
    factors = (0.0, *number.each(slot))
    return tuple((begin, end, place, strength * factors[place]) for begin, end, place, strength in slot.runs(size))


def _is_own(tensor: Tensor, dtype: torch.dtype) -> bool:
    """Return whether a tensor is no subclass with rules of its own, and of this dtype."""
    return type(tensor) in (Tensor, torch.nn.Parameter) and tensor.dtype is dtype


def _plain(y: Tensor, x: Tensor, down: RowSource, up: RowSource, slot: RowSlot, number: RowNumber | float) -> Tensor:
    first, second = down.take(slot, x.shape[0], True), up.take(slot, x.shape[0], True)
    return add_linear_rows(y, linear_rows(x, first), second, slot, number)


def run(scope: Scope) -> None:
    """Rewrite `add_linear_rows(y, linear_rows(x, take(down)), take(up))`."""
    for node in list(scope.graph.nodes):
        if node.target is not add_linear_rows:
            continue
        y, h, up, slot, number = node.args
        if not (_only(h, node, linear_rows) and len(h.args) == 2 and _only(up, node, take)):
            continue
        x, down = h.args
        if not _only(down, h, take) or not (up.args[3] and down.args[3]):
            continue
        fused = add_low_rank_rows_ if _may_overwrite(scope, y, node) else add_low_rank_rows
        with scope.graph.inserting_before(node):
            new = scope.graph.call_function(fused, (y, x, down.args[1], up.args[1], slot, number))
        node.replace_all_uses_with(new)
        for gone in (node, h, up, down):
            scope.graph.erase_node(gone)


def _only(node: Any, user: fx.Node, target: Any) -> bool:
    """Return whether a node calls this function, for this user alone."""
    return isinstance(node, fx.Node) and node.target is target and set(node.users) == {user}


def _may_overwrite(scope: Scope, y: fx.Node, user: fx.Node) -> bool:
    """Return whether what came out of the host is new, and read here alone: `rows_out` asks for its shape only."""
    if not _only(y, user, rows_in):
        return False
    out = y.args[1]
    assert isinstance(out, fx.Node)
    if not all(reader is y or (reader.target is rows_out and reader.args[0] is out) for reader in out.users):
        return False
    if out.target is rows_out:  # of the link before
        before = out.args[1]
        return isinstance(before, fx.Node) and before.target in (add_low_rank_rows, add_low_rank_rows_)
    return scope.owned and out.op == "call_module" and out.target == "base"
