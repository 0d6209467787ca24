"""Links: one delta's formula at one site, as the key of a graph; and the inputs a formula is traced with."""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, fx
from torch.nn import functional as F

from deltaspec.methods.declarations import Form, MethodParams
from deltaspec.methods.registry import methods

Call = Callable[..., fx.Node]
"""Emitter of one call of the host: (input node, replaced parameters by own name) -> node of what leaves."""


@dataclass(frozen=True, slots=True)
class Link:
    """One delta in a site's chain: all that its formula depends on, and nothing of its values."""

    method: str
    params: MethodParams
    form: Form
    compute: str | None = None
    """dtype to compute in where the delta's is not the host's own (`float32`), without the torch prefix: the wider."""
    narrow: bool = False
    """Whether the delta's tensors have another dtype than `compute`."""
    scaled: bool = False
    """Whether what it adds is scaled by a strength, which is data."""
    per_row: bool = False
    """Whether each row of the batch has its own tensors and its own strength."""
    buffers: frozenset[str] = frozenset()
    """Names of the tensors that the delta holds as buffers."""

    @property
    def reads_stream(self) -> bool:
        """Whether its formula reads what enters another module."""
        return methods()[self.method].stream(self.params) is not None


@dataclass(frozen=True, slots=True)
class Inputs:
    """Nodes that hold one link's tensors, and the name to call its dropout by."""

    tensors: dict[str, fx.Node]
    dropout: str | None
    argument: Callable[[str], fx.Node] | None = None
    """Emitter of a lookup of one of the host's arguments by name; None where the host takes the hidden state alone."""
    strength: fx.Node | None = None
    """Node of its strength, where it is scaled; of the rows' `RowSlot`, where it is per row."""
    stream: Callable[[], fx.Node] | None = None
    """Emitter of what entered the module that the formula reads besides; None where it reads none."""
    numbers: tuple[fx.Node, ...] = ()
    """Nodes of the factors that differ from row to row, in the order of `Formula.numbers`; `RowNumber`s."""
    swapped: Callable[[], fx.Node] | None = None
    """Emitter of the input that runs the host on other parameters, for formulas per row."""


def like(x: Tensor, other: Tensor) -> Tensor:
    """Return `x` in the dtype of another tensor."""
    dtype = other.dtype
    return x if x.dtype is dtype else x.to(dtype)


def keeps_dtype(result: fx.Node, leaving: fx.Node) -> bool:
    """Return whether what a formula makes of the host's output has its dtype, under autocast, too.

    Autocast gives products its own narrow dtype, and other tensors of a delta stay wide.
    """
    if result is leaving:
        return True
    if result.target not in (torch.add, operator.add) or len(result.args) != 2:
        return False
    y, update = result.args
    return y is leaving and isinstance(update, fx.Node) and update.target is F.linear


def widened(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a delta's tensor in a wider dtype; whole numbers stay."""
    return tensor.to(dtype) if tensor.is_floating_point() else tensor
