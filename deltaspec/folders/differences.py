"""What a full fine-tune changed, tensor by tensor, and which method says each change."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from deltaspec.backbone.table import ModuleTable, ParameterInfo, Row
from deltaspec.deltas.finite import is_finite
from deltaspec.diagnostics.findings import Diagnostic
from deltaspec.diagnostics.progress import tracked
from deltaspec.folders.low_rank import LowRank, low_rank
from deltaspec.folders.weights import Tensors
from deltaspec.methods.builtin.full import STATISTICS
from deltaspec.methods.shared.weights import canonical
from deltaspec.names.folding import shown
from deltaspec.names.paths import below

_KINDS = ("linear", "conv1d", "embedding", "conv")
"""Kinds of modules whose weight low-rank factors change."""
_FEW = 8
"""An embedding of which at most one row in so many changed has trained rows, beside a table that stays."""


@dataclass(frozen=True, slots=True, eq=False)
class Change:
    """One tensor that differs, and what says so."""

    row: Row
    parameter: str | None
    """Own name of the parameter; None for a module as a whole."""
    tied: str | None
    """For tied ones: `together` where all places changed alike, `alone` for this one; None for others."""
    factors: LowRank | None = None
    rows: tuple[int, ...] = ()
    """The rows of an embedding that changed, where they are few."""

    @property
    def fqn(self) -> str:
        """Name of the tensor, or of the module."""
        return self.row.fqn if self.parameter is None else below(self.row.fqn, self.parameter)

    @property
    def method(self) -> str:
        """The method that says the change."""
        return "lora" if self.factors is not None else "trainable_tokens" if self.rows else "full"

    @property
    def error(self) -> float:
        """Norm of what is not said of the change, over that of the change."""
        return 0.0 if self.factors is None else self.factors.error

    def __str__(self) -> str:
        how = f"rank {self.factors.rank}" if self.factors else f"{len(self.rows)} rows" if self.rows else "whole"
        return f"{self.fqn}: {self.method}, {how}, error {self.error:.2g}"


class Comparer:
    """Compares two models of one structure."""

    def __init__(self, table: ModuleTable, base: Tensors, full: Tensors, rank: int | None, error: float) -> None:
        self._table, self._base, self._full, self._rank, self._error = table, base, full, rank, error
        self.findings: list[Diagnostic] = []
        self._others: dict[str, list[str]] = {}
        """Names of what is no pair of tensors, by what is said of them: models of two kinds differ in hundreds."""
        self.rounded: list[str] = []
        """Names of the tensors of the fine-tune that are the base's own, rounded to a coarser dtype."""

    def changes(self) -> Iterator[Change]:
        """Yield all changes, module by module, and collect what cannot be said (DS520, DS556, DS557)."""
        seen: set[str] = set()
        for row in tracked(self._table.rows, "comparing weights", len(self._table.rows)):
            if self._statistics(row):
                seen |= {p.fqn for p in row.parameters}
                yield Change(row, None, None)
                continue
            for parameter in row.parameters:
                if parameter.fqn in seen:
                    continue
                tied = self._tied(parameter)
                if tied == "together":
                    seen |= set(parameter.tied)
                change = self._compared(row, parameter, tied)
                if change is not None:
                    yield change
        hint = "name the base that was fine-tuned, and folders of one class (save_pretrained)"
        for said, names in self._others.items():
            self._find("DS556", f"{shown(names)}: {said}", hint)

    def _tied(self, parameter: ParameterInfo) -> str | None:
        if not parameter.tied:
            return None
        own = self._full.find(parameter.fqn)
        others = [self._full.find(place) for place in parameter.tied]
        same = own is not None and all(other is not None and _equal(own, other) for other in others)
        return "together" if same else "alone"

    def _statistics(self, row: Row) -> bool:
        """Return whether the statistics of a norm differ, which only a trained copy of the whole norm has."""
        names = [buffer.fqn for buffer in row.buffers]
        pairs = [(name, self._base.find(name), self._full.find(name)) for name in names]
        both = [(n, one, other) for n, one, other in pairs if one is not None and other is not None]
        unlike = {n: _is_rounded(one, other) for n, one, other in both if not _equal(one, other)}
        self.rounded += [name for name, rounded in unlike.items() if rounded]
        differ = [name for name, rounded in unlike.items() if not rounded]
        if differ and set(row.bases).isdisjoint(STATISTICS):
            self._find("DS557", f"{differ[0]} differs, a buffer that no delta changes", "copy it by hand")
            return False
        return bool(differ)

    def _compared(self, row: Row, parameter: ParameterInfo, tied: str | None) -> Change | None:
        base, full = self._base.find(parameter.fqn), self._full.find(parameter.fqn)
        if base is None or full is None:
            said = f"in {'the base' if full is None else 'the fine-tune'} alone"
            self._others.setdefault(said, []).append(parameter.fqn)
        elif base.shape != full.shape:
            said = f"{list(full.shape)}, and {list(base.shape)} in the base"
            self._others.setdefault(said, []).append(parameter.fqn)
        elif not base.is_floating_point() or base.itemsize < 2 or full.itemsize < 2:
            if not _equal(base, full):
                self._find("DS557", f"{parameter.fqn} is kept as codes, which no delta changes", "use plain weights")
        elif not is_finite(full):
            self._find("DS520", f"{parameter.fqn} of the fine-tune has NaN or infinite values", "train it again")
        elif not _equal(base, full):
            if not _is_rounded(base, full):
                return self._change(row, parameter, tied, full.to(_wide(full, base)) - base.to(_wide(full, base)))
            self.rounded.append(parameter.fqn)
        return None

    def _change(self, row: Row, parameter: ParameterInfo, tied: str | None, difference: Tensor) -> Change:
        whole = Change(row, parameter.name, tied)
        odd = row.conv is not None and (row.conv.transposed or row.conv.groups > 1)
        if row.kind not in _KINDS or parameter.name != "weight" or odd or not row.faithful:
            return whole
        if row.kind == "embedding":
            rows = (difference != 0).any(1).nonzero().flatten().tolist()
            if len(rows) * _FEW <= len(difference):
                return Change(row, None, tied, rows=tuple(rows))
        if tied == "together" or difference.dim() < 2:
            return whole
        matrix = difference.flatten(1) if row.kind == "conv" else canonical(row.kind, difference)
        factors = low_rank(matrix, self._rank, self._error)
        dear = factors.rank * sum(matrix.shape) >= prod(matrix.shape)
        return whole if dear else Change(row, None, tied, factors)

    def _find(self, code: str, message: str, hint: str) -> None:
        self.findings.append(Diagnostic(code, message, file="<fine-tune>", suggestion=hint))


def _equal(one: Tensor, other: Tensor) -> bool:
    if one.is_floating_point() and other.is_floating_point():
        one, other = one.to(_wide(one, other)), other.to(_wide(one, other))
    return torch.equal(one, other)


def _is_rounded(base: Tensor, full: Tensor) -> bool:
    """Return whether a tensor of the fine-tune that differs from the base's is that one in its own, coarser dtype."""
    return base.is_floating_point() and full.is_floating_point() and torch.equal(base.to(full.dtype), full)


def _wide(one: Tensor, other: Tensor) -> torch.dtype:
    """Return a dtype in which both are exact; torch promotes no float8."""
    return torch.float64 if torch.float64 in (one.dtype, other.dtype) else torch.float32
