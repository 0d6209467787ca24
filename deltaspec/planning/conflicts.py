"""Deltas that must not act at once: one would drop, or not see, what the other does to a weight."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from deltaspec.diagnostics.findings import DeltaSpecError, Diagnostic
from deltaspec.diagnostics.wording import counted
from deltaspec.methods.registry import methods
from deltaspec.names.folding import shown
from deltaspec.planning.derived import changed_parameters

if TYPE_CHECKING:
    from deltaspec.language.model import DeltaSpec
    from deltaspec.planning.planned import PlannedDelta, PlannedSite

Clash = Literal["computes from", "replaces", "both replace"]
"""Way in which two deltas clash: what the second does to weights that the first one changes, or what both do."""
_TURNS = "let them take turns: attached: false on one"


@dataclass(frozen=True, slots=True)
class _Weights:
    """The weights that one weight-expressible delta changes and computes from, as FQNs of modules."""

    called: frozenset[str]
    """Modules whose weight it changes around their call."""
    folded: frozenset[str]
    """Modules whose weight it changes by folding into it."""
    reads: frozenset[str]
    """Modules whose weight it computes from."""
    replaced: frozenset[str] | None
    """FQNs of the parameters that it replaces; None where it adds."""
    biases: frozenset[str]
    """Modules whose bias, and not their weight, it computes from."""
    bases: frozenset[str]
    """Modules whose weight has to be the backbone's own."""
    method: str
    planned: tuple[PlannedSite, ...]

    @property
    def sites(self) -> frozenset[str]:
        """Modules whose weight it changes either way."""
        return self.called | self.folded

    @property
    def clashes(self) -> bool:
        """Whether there may be a delta that must not come before it: what only adds, as most do, has none."""
        return bool(self.reads or self.biases or self.bases) or self.replaced is not None

    def misses(self, before: _Weights) -> frozenset[str]:
        """Return the sites at which it would not see what a delta before it does to the weight; both fold, it does."""
        if not (self.reads or self.biases or self.bases):
            return frozenset()
        unseen = before.called | (before.folded - self.folded)
        found = (self.reads & unseen) | (self.bases & before.sites)
        biased = (self.biases & unseen) - found
        return found | before._changing_bias(biased) if biased else found

    def _changing_bias(self, modules: frozenset[str]) -> frozenset[str]:
        """Return those of some modules whose bias it changes."""
        method = methods()[self.method]
        places = (planned for planned in self.planned if planned.site.row.fqn in modules)
        return frozenset(p.site.row.fqn for p in places if "bias" in changed_parameters(method, p))


def _clashes(before: _Weights, after: _Weights) -> Iterator[tuple[Clash, frozenset[str]]]:
    """Return why two deltas cannot act at once in this order, and where: modules, or parameters that both replace.

    A trained copy replaces the weight, so nothing may come before it; what computes from the backbone's own weight
    behind a delta that changes it would be another one once merged.
    """
    if unseen := after.misses(before):
        yield "computes from", unseen
    if after.replaced is None:
        return
    if before.replaced is None:
        if both := before.sites & after.sites:
            yield "replaces", both
    elif both := before.replaced & after.replaced:
        yield "both replace", both


def conflicts(specs: Sequence[DeltaSpec], deltas: Sequence[PlannedDelta]) -> list[Diagnostic]:
    """Find deltas that start attached and cannot act at once (DS406); those that take turns may share a site."""
    findings = []
    places = [(spec, index) for spec in specs for index in range(len(spec.deltas))]
    earlier: list[tuple[str, _Weights]] = []
    for (spec, index), delta in zip(places, deltas, strict=True):
        if delta.attached and _changes_weights(delta):
            after = _weights(delta)
            for name, before in earlier if after.clashes else ():
                for clash, names in _clashes(before, after):
                    # Where the one that comes first could not come behind either, another order is no way out.
                    stuck = before.misses(after) if before.replaced is None else before.sites
                    for behind, sites in _by_way_out(delta, names, stuck).items():
                        findings.append(_conflict(spec, index, name, clash, sites, behind))
            earlier.append((delta.name, after))
    return findings


def _by_way_out(delta: PlannedDelta, names: frozenset[str], stuck: frozenset[str]) -> dict[bool, list[str]]:
    """Return the sites that names of modules or parameters mean: those that are stuck, and the others."""
    found: dict[bool, list[str]] = {}
    for site in delta.sites:
        module = site.site.row.fqn
        if module in names or not names.isdisjoint(_parameters(site)):
            found.setdefault(module in stuck, []).append(site.fqn)
    return found


def _conflict(spec: DeltaSpec, index: int, other: str, clash: Clash, sites: list[str], stuck: bool) -> Diagnostic:
    entry, where = spec.deltas[index], f"{counted(len(sites), 'site')}: {shown(sites)}"
    key = "target" if entry.target and clash != "computes from" else "method"
    if clash == "both replace":
        message = f"deltas {other!r} and {entry.name!r} both replace the same parameters ({where})"
        hint = f"take the part out of one of them, or {_TURNS}"
    else:
        message = f"delta {entry.name!r} {clash} weights that delta {other!r} before it changes ({where})"
        hint = _TURNS if stuck else f"list {entry.name!r} before {other!r}, or {_TURNS}"
    return spec.diagnostic("DS406", message, ("deltas", index, key), hint)


class Rivals:
    """Knows which of a model's deltas cannot act at once."""

    def __init__(self, deltas: Iterable[PlannedDelta]) -> None:
        self._weights: dict[str, _Weights] = {}
        """The weights of each delta, by its name."""
        self._known: dict[int, tuple[tuple[PlannedSite, ...], _Weights]] = {}
        """The same by the identity of a tuple of sites, which alike deltas share."""
        for delta in deltas:
            self.add(delta)

    def __deepcopy__(self, memo: object) -> Rivals:
        """Copy without copying what it knows, which is data."""
        twin = type(self)(())
        vars(twin).update(_weights=dict(self._weights), _known=dict(self._known))
        return twin

    def add(self, delta: PlannedDelta) -> None:
        """Add a delta."""
        if _changes_weights(delta):
            found = self._known.get(id(delta.sites))
            if found is None:
                found = self._known[id(delta.sites)] = delta.sites, _weights(delta)
            self._weights[delta.name] = found[1]

    def discard(self, name: str) -> None:
        """Forget a delta."""
        self._weights.pop(name, None)

    def sweep(self) -> None:
        """Forget what was known of sites that no delta has any more."""
        left = {id(weights) for weights in self._weights.values()}
        self._known = {key: known for key, known in self._known.items() if id(known[1]) in left}

    def refuse(self, names: Sequence[str]) -> None:
        """Raise DeltaSpecError (DS436) where two of these deltas, in order of application, cannot act at once."""
        findings = []
        weighty = [name for name in names if name in self._weights]
        sensitive = [place for place, name in enumerate(weighty) if self._weights[name].clashes]
        for a, b in ((a, weighty[place]) for place in sensitive for a in weighty[:place]):
            for clash, where in _clashes(self._weights[a], self._weights[b]):
                message = f"delta {b!r} {clash} the weight of {min(where)}, which delta {a!r} before it changes"
                if clash == "both replace":
                    message = f"deltas {a!r} and {b!r} both replace {min(where)}"
                alone = a if clash == "both replace" else b
                findings.append(Diagnostic("DS436", message, suggestion=f"attach one of them: c.only({alone!r})"))
        if findings:
            raise DeltaSpecError(findings)


def _changes_weights(delta: PlannedDelta) -> bool:
    return methods()[delta.method].promises.weight is not None


def _weights(delta: PlannedDelta) -> _Weights:
    method = methods()[delta.method]
    folded = frozenset(s.site.row.fqn for s in delta.sites if method.folds(s.site, s.params))
    reads = frozenset(s.site.row.fqn for s in delta.sites if method.reads_weight(s.site, s.params))
    biases = frozenset(s.site.row.fqn for s in delta.sites if method.reads_bias(s.site, s.params))
    bases = frozenset(s.site.row.fqn for s in delta.sites if method.needs_base(s.site, s.params))
    called = frozenset(s.site.row.fqn for s in delta.sites) - folded
    named = frozenset(p for s in delta.sites for p in _parameters(s)) if method.promises.weight == "replace" else None
    return _Weights(called, folded, reads, named, biases, bases, delta.method, delta.sites)


def _parameters(planned: PlannedSite) -> list[str]:
    """Return the FQNs that the tensors of a site have where they stand for the module's own parameters."""
    return [f"{planned.site.row.fqn}.{tensor.name}" for tensor in planned.tensors]
