"""Whether two computations of the same answers agree: differences, tolerances, a table of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from deltaspec.diagnostics.clean import clean
from deltaspec.diagnostics.findings import Diagnostic

TOLERANCES: Mapping[str, float] = {"float64": 1e-9, "float32": 1e-4, "float16": 1e-2, "bfloat16": 5e-2}
"""The largest difference that rounding makes in a whole model, over the largest magnitude of what was expected: by the
coarser of the dtypes that the two sides computed in."""
SAME, DIFFERS, BASE = "same", "differs", "as without the delta"


@dataclass(frozen=True, slots=True)
class Agreement:
    """What came of comparing the answers of one set of deltas."""

    attached: Mapping[str, float]
    """The deltas that were attached, and their strengths."""
    absolute: float
    """Largest difference."""
    relative: float
    """The same over the largest magnitude of what was expected."""
    argmax: float
    """Share of the positions at which the same is largest, up to what the tolerance leaves open."""
    verdict: str
    """`same`, `differs`, or that the answers are those of the backbone alone, if anything."""
    dtype: str
    tolerance: float

    @property
    def name(self) -> str:
        """The deltas, with strengths that are not 1."""
        return " + ".join(n if s == 1 else f"{s:g} × {n}" for n, s in self.attached.items()) or "(none)"


class Verification(tuple[Agreement, ...]):
    """What came of comparing all answers of a set with others; true where all agree. Printed, it is a table."""

    __slots__ = ()

    @property
    def findings(self) -> list[Diagnostic]:
        """A finding (DS552) for each set of deltas whose answers are not the same."""
        return [_finding(each) for each in self if each.verdict != SAME]

    def __bool__(self) -> bool:
        return not self.findings

    def __str__(self) -> str:
        return "\n".join(self._lines())

    def _lines(self) -> Iterator[str]:
        head = ("deltas", "max abs", "max rel", "argmax", "verdict")
        cells = [(clean(a.name), f"{a.absolute:.3g}", f"{a.relative:.2g}", f"{a.argmax:.1%}", a.verdict) for a in self]
        widths = [max(map(len, column)) for column in zip(head, *cells, strict=True)]
        for first, *rest in (head, *cells):
            numbers = (cell.rjust(width) for cell, width in zip(rest[:-1], widths[1:], strict=False))
            yield "  ".join((first.ljust(widths[0]), *numbers, rest[-1]))
        used = {each.dtype: each.tolerance for each in self}
        limits = ", ".join(f"{tolerance:g} ({dtype})" for dtype, tolerance in used.items())
        yield f"same: max rel, over the largest magnitude, is at most {limits}, and the base is farther off"


def coarser(*dtypes: str) -> str:
    """Return the dtype of these whose tolerance is the largest. Raises KeyError for one that has none."""
    return max(dtypes, key=TOLERANCES.__getitem__)


def agreement(
    attached: Mapping[str, float],
    expected: Tensor,
    base: Tensor,
    found: Tensor,
    *,
    dtype: str,
    mask: Tensor | None = None,
    tolerance: float | None = None,
) -> Agreement:
    """Compare answers `[..., classes]` with those that were expected; `base` is what the backbone alone gave.

    `mask` says which positions count; `dtype` is the coarser one that they were computed in, `tolerance` takes the
    place of what the table has for it.
    """
    limit = TOLERANCES[dtype] if tolerance is None else tolerance
    if found.shape != expected.shape:
        return Agreement(attached, float("inf"), float("inf"), 0.0, DIFFERS, dtype, limit)
    expected, base, found = (_counted(value, mask) for value in (expected, base, found))
    finite = expected[expected.isfinite()].abs()
    scale = float(finite.max()) if finite.numel() else 0.0
    absolute, from_base = _largest(found, expected), _largest(found, base)
    relative = absolute / scale if scale else (0.0 if not absolute else float("inf"))
    slack = 2 * limit * scale
    verdict = DIFFERS
    if from_base < absolute and from_base <= limit * scale:
        verdict = BASE
    elif relative <= limit:
        verdict = SAME
    return Agreement(attached, absolute, relative, _same_largest(expected, found, slack), verdict, dtype, limit)


def _counted(value: Tensor, mask: Tensor | None) -> Tensor:
    wide = value.detach().to("cpu", torch.float64)
    return wide if mask is None else wide[mask.cpu()]


def _largest(one: Tensor, other: Tensor) -> float:
    """Return the largest difference; infinite where only one is not a number."""
    same = (one == other) | (one.isnan() & other.isnan())
    difference = torch.where(same, 0.0, (one - other).abs()).nan_to_num(nan=float("inf"), posinf=float("inf"))
    return float(difference.max()) if difference.numel() else 0.0


def _same_largest(expected: Tensor, found: Tensor, slack: float) -> float:
    """Return at which share of positions what is largest in one is so in the other, but for `slack`."""
    if not expected.dim() or not expected.numel():
        return 1.0
    chosen = expected.gather(-1, found.nan_to_num().argmax(-1, keepdim=True)).squeeze(-1)
    return float((chosen >= expected.amax(-1) - slack).double().mean())


def _finding(each: Agreement) -> Diagnostic:
    much = f"by {each.absolute:.3g} ({each.relative:.2g} of the largest), argmax is the same at {each.argmax:.0%}"
    message = f"the answers of {each.name} are not those that were kept: they differ {much}"
    hint = "compare dtype, tokenizer, attention and the base's revision; the lock says which base the delta is for"
    if each.verdict == BASE:
        message += ", and are those of the base alone"
        hint = "the delta is not at work there: check that it was loaded under this name, with every module of it"
    return Diagnostic("DS552", message, suggestion=hint)
