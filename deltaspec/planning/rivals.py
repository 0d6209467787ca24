"""Deltas that must not act at once: one would drop, or not see, what the other does to a weight."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from deltaspec.diagnostics import DeltaSpecError, Diagnostic
from deltaspec.methods import methods

if TYPE_CHECKING:
    from deltaspec.planning.planned import PlannedDelta, PlannedSite


@dataclass(frozen=True, slots=True)
class _Weights:
    """What one weight-expressible delta does with the weights of its sites, as FQNs of modules."""

    called: frozenset[str]
    """Changed around the module's call."""
    folded: frozenset[str]
    """Changed by folding into the weight."""
    reads: frozenset[str]
    """Computed from."""
    replaced: frozenset[str] | None
    """Parameters that it replaces; None where it adds."""

    @property
    def sites(self) -> frozenset[str]:
        """Changed either way."""
        return self.called | self.folded

    def misses(self, before: _Weights) -> frozenset[str]:
        """Give the sites at which it would not see what a delta before it does to the weight; both fold, it does."""
        return self.reads & (before.called | (before.folded - self.folded))


class Rivals:
    """Knows which of a model's deltas cannot act at once."""

    def __init__(self, deltas: Iterable[PlannedDelta]) -> None:
        self._weights: dict[str, _Weights] = {}
        self._known: dict[int, tuple[tuple[PlannedSite, ...], _Weights]] = {}
        """By tuple of sites, which alike deltas share."""
        for delta in deltas:
            self.add(delta)

    def __deepcopy__(self, memo: object) -> Rivals:
        """Copy without what it knows of, which is data."""
        twin = type(self)(())
        twin._weights, twin._known = dict(self._weights), dict(self._known)
        return twin

    def add(self, delta: PlannedDelta) -> None:
        """Take in a delta."""
        if methods()[delta.method].promises.weight is not None:
            found = self._known.get(id(delta.sites))
            if found is None:
                found = self._known[id(delta.sites)] = delta.sites, _weights(delta)
            self._weights[delta.name] = found[1]

    def discard(self, name: str) -> None:
        """Forget a delta."""
        self._weights.pop(name, None)

    def refuse(self, names: Sequence[str]) -> None:
        """Raise DeltaSpecError (DS436) where two of these deltas, in order of application, cannot act at once."""
        findings = []
        weighty = [name for name in names if name in self._weights]
        for a, b in itertools.combinations(weighty, 2):
            before, after = self._weights[a], self._weights[b]
            if both := after.misses(before):
                message = f"delta {b!r} computes from the weight of {min(both)}, which delta {a!r} before it changes"
                findings.append(Diagnostic("DS436", message, suggestion=f"attach one of them: c.only({b!r})"))
            if after.replaced is None:
                continue
            if before.replaced is None:
                if both := before.sites & after.sites:
                    message = f"delta {b!r} replaces the weight of {min(both)}, which delta {a!r} before it changes"
                    findings.append(Diagnostic("DS436", message, suggestion=f"attach one of them: c.only({b!r})"))
            elif both := before.replaced & after.replaced:
                message = f"deltas {a!r} and {b!r} both replace {min(both)}"
                findings.append(Diagnostic("DS436", message, suggestion=f"attach one of them: c.only({a!r})"))
        if findings:
            raise DeltaSpecError(findings)


def _weights(delta: PlannedDelta) -> _Weights:
    method = methods()[delta.method]
    folded = {s.site.row.fqn for s in delta.sites if method.folds(s.site, s.params)}
    reads = {s.site.row.fqn for s in delta.sites if method.reads_weight(s.site, s.params)}
    called = {s.site.row.fqn for s in delta.sites} - folded
    replaced = None
    if method.promises.weight == "replace":
        replaced = frozenset(f"{site.site.row.fqn}.{spec.name}" for site in delta.sites for spec in site.tensors)
    return _Weights(frozenset(called), frozenset(folded), frozenset(reads), replaced)
