"""Deltas that must not act at once: one would drop, or not see, what the other does to a weight."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from deltaspec.diagnostics.findings import DeltaSpecError, Diagnostic
from deltaspec.diagnostics.wording import counted
from deltaspec.methods.registry import methods
from deltaspec.names.folding import shown

if TYPE_CHECKING:
    from deltaspec.language.model import DeltaSpec
    from deltaspec.methods.base import Method
    from deltaspec.planning.planned import PlannedDelta, PlannedSite


_TURNS = "let them take turns: attached: false on one"


def _conflicts(specs: Sequence[DeltaSpec], deltas: Sequence[PlannedDelta]) -> list[Diagnostic]:
    """Find deltas that cannot share a site: a trained copy replaces the weight, so nothing may come before it."""
    findings = []
    places = [(spec, index) for spec in specs for index in range(len(spec.deltas))]
    before: dict[str, list[tuple[PlannedDelta, PlannedSite]]] = {}
    for (spec, index), delta in zip(places, deltas, strict=True):
        method = methods()[delta.method]
        replaces = method.promises.weight == "replace"
        findings += _unseen(spec, index, delta, before)
        clashes: dict[tuple[str, bool, bool], list[str]] = {}
        for site in delta.sites if replaces else ():
            for other, earlier in before.get(site.site.row.fqn, ()):
                form = methods()[other.method].promises.weight
                if form is None:
                    continue  # what works around the call does so around the trained copy, too
                twice = form == "replace"
                names = {t.name for t in site.tensors} & {t.name for t in earlier.tensors}
                # They may take turns; both at once would silently drop the first. Attaching refuses that, too (DS436).
                if (names or not twice) and other.attached and delta.attached:
                    behind = _clashes_behind(other, earlier, site, method)
                    clashes.setdefault((other.name, twice, behind), []).append(site.fqn)
        for (other_name, twice, behind), names_ in clashes.items():
            path = ("deltas", index, "target") if spec.deltas[index].target else ("deltas", index, "method")
            where = f"{counted(len(names_), 'site')}: {shown(names_)}"
            if twice:
                message = f"deltas {other_name!r} and {delta.name!r} both replace the same parameters ({where})"
                hint = f"take the part out of one of them, or {_TURNS}"
            else:
                message = f"delta {delta.name!r} replaces weights that delta {other_name!r} before it changes ({where})"
                hint = _TURNS if behind else f"list {delta.name!r} before {other_name!r}, or {_TURNS}"
            findings.append(spec.diagnostic("DS406", message, path, hint))
        for site in delta.sites:
            before.setdefault(site.site.row.fqn, []).append((delta, site))
    return findings


def _unseen(
    spec: DeltaSpec, index: int, delta: PlannedDelta, before: Mapping[str, list[tuple[PlannedDelta, PlannedSite]]]
) -> list[Diagnostic]:
    """Find what computes from the backbone's weight behind a delta that changes it: merged, it would be another one."""
    method = methods()[delta.method]
    clashes: dict[tuple[str, bool], list[str]] = {}
    for site in delta.sites if delta.attached else ():
        if method.reads_weight(site.site, site.params):
            for other, earlier in before.get(site.site.row.fqn, ()):
                first = methods()[other.method]
                # Where both fold, the second does see the weight that the first one made.
                seen = method.folds(site.site, site.params) and first.folds(earlier.site, earlier.params)
                if other.attached and first.promises.weight is not None and not seen:
                    behind = _clashes_behind(other, earlier, site, method)
                    clashes.setdefault((other.name, behind), []).append(site.fqn)
    findings = []
    for (other_name, behind), names in clashes.items():
        where = f"{counted(len(names), 'site')}: {shown(names)}"
        message = f"delta {delta.name!r} computes from weights that delta {other_name!r} before it changes ({where})"
        hint = _TURNS if behind else f"list {delta.name!r} before {other_name!r}, or {_TURNS}"
        findings.append(spec.diagnostic("DS406", message, ("deltas", index, "method"), hint))
    return findings


def _clashes_behind(other: PlannedDelta, earlier: PlannedSite, site: PlannedSite, method: Method) -> bool:
    """Return whether a delta that now comes first could not come behind the one of this method either."""
    first = methods()[other.method]
    if first.promises.weight == "replace":
        return True
    both_fold = first.folds(earlier.site, earlier.params) and method.folds(site.site, site.params)
    return first.reads_weight(earlier.site, earlier.params) and not both_fold


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
        """Return the sites at which it would not see what a delta before it does to the weight; both fold, it does."""
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
