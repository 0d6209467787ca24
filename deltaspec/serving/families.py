"""Families: deltas of one method whose formulas are the same but for sizes and factors, so that rows may mix them.

They need not have the same sites: at a site that a row's delta does not have, the row is without it. Each family takes
one place in the order of application, whatever ranks and scales its members have.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from itertools import count
from typing import Any
from weakref import WeakKeyDictionary

from deltaspec.deltas.modules import attribute_name, storage_key
from deltaspec.deltas.stack import Stack
from deltaspec.deltas.stacks import Kind, Stacks
from deltaspec.graphs.formula import formula
from deltaspec.graphs.patterns import pattern
from deltaspec.methods.registry import methods
from deltaspec.planning.planned import PlannedSite
from deltaspec.runtime.forms import call_form
from deltaspec.runtime.placements import Placement, Placements
from deltaspec.runtime.program_builder import ProgramBuilder

SiteKey = tuple[str, str | None, str | None]
"""A site, whatever delta it is of: module, parameter, host."""
_NUMBERS: WeakKeyDictionary[Kind, int] = WeakKeyDictionary()
_NEXT = count(1)


def site_key(placement: Placement) -> SiteKey:
    """Return the site of a placement."""
    site = placement.planned.site
    return site.row.fqn, site.parameter, site.host


@dataclass(frozen=True, slots=True)
class Home:
    """Where a member of a family keeps one tensor."""

    stack: Stack
    key: str
    attribute: str
    """Name in the module of a delta."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the tensor of one delta."""
        return self.stack.layout.slots[self.key].shape


def homes_of(planned: PlannedSite, stack: Stack) -> dict[str, Home]:
    """Return where the tensors of a planned site are, by own name."""
    keys = {spec.name: storage_key(planned.site.row.fqn, spec) for spec in planned.tensors}
    return {name: Home(stack, key, attribute_name(key)) for name, key in keys.items()}


@dataclass(frozen=True, eq=False, slots=True)
class Part:
    """What the deltas of one kind are at a site."""

    homes: dict[str, Home]
    """By own name."""
    factors: tuple[float, ...]
    """The formula's numbers."""
    drops: bool
    """Whether the formula drops values, where it is asked to."""
    dropout: float
    """Probability that it is asked for."""


@dataclass(frozen=True, eq=False, slots=True)
class Member:
    """The deltas of one kind, as a part of a family."""

    number: int
    kind: Kind
    scope: int
    """Number of its set of sites in the family."""
    at: dict[SiteKey, Part]


@dataclass(eq=False)
class Family:
    """Deltas whose rows are computed together."""

    method: str
    number: int
    patterns: dict[SiteKey, Any] = field(default_factory=dict)
    members: dict[int, Member] = field(default_factory=dict)  # no list: Dynamo would compile anew whenever one grows
    scopes: dict[int, tuple[SiteKey, ...]] = field(default_factory=dict)
    """Sets of sites that members have, by their numbers in the model."""

    def at(self, site: SiteKey) -> Part:
        """Return what some member is at a site: all have the same formula there."""
        return next(member.at[site] for member in self.members.values() if site in member.at)

    def takes(self, patterns: dict[SiteKey, Any]) -> bool:
        """Return whether deltas of these patterns can be members: they share sites, and agree there."""
        shared = [key for key in patterns if key in self.patterns]
        return bool(shared) and all(self.patterns[key] == patterns[key] for key in shared)

    def join(self, kind: Kind, patterns: dict[SiteKey, Any], at: dict[SiteKey, Part], scope: int) -> Member:
        """Make the deltas of a kind, whose set of sites has a number, a member."""
        self.patterns |= patterns
        self.scopes[scope] = tuple(patterns)
        member = Member(len(self.members), kind, scope, at)
        self.members[member.number] = member
        return member


@dataclass(frozen=True, slots=True)
class Place:
    """One place in the order of application: the family whose deltas rows have there, and what of it they may have."""

    family: Family
    scopes: tuple[int, ...]
    members: tuple[int, ...]

    @property
    def key(self) -> str:
        """What the forwards depend on; no other place of this process has it."""
        return f"{self.family.method} {self.family.number} {','.join(map(str, self.scopes))}"

    @property
    def lines(self) -> tuple[frozenset[int], ...]:
        """Scopes that have a site, for each such set that occurs: sites alike in this have rows in common."""
        return tuple(dict.fromkeys(self.line(key) for scope in self.scopes for key in self.family.scopes[scope]))

    def line(self, site: SiteKey) -> frozenset[int]:
        """Return which of the scopes have a site."""
        return frozenset(scope for scope in self.scopes if site in self.family.scopes[scope])

    def on(self, line: frozenset[int]) -> tuple[int, ...]:
        """Return the members that have the sites of a line."""
        return tuple(m for m in self.members if self.family.members[m].scope in line)


Standing = list[tuple[Place, list[str]]]
"""Place by place: a delta for each of its sets of sites."""


def placed_together(placements: Placements, names: Iterable[str]) -> dict[str, dict[SiteKey, Placement]]:
    """Return the placements of deltas of one family, by host; one for each site."""
    found: dict[str, dict[SiteKey, Placement]] = {}
    for name in names:
        for host, here in placements[name].items():
            for placement in here:
                found.setdefault(host, {}).setdefault(site_key(placement), placement)
    return found


class Families:
    """The families of the deltas that rows had so far."""

    def __init__(self, builder: ProgramBuilder, stacks: Stacks) -> None:
        self._builder, self._stacks = builder, stacks
        self._families: list[Family] = []
        self._members: dict[Kind, tuple[Family, Member]] = {}
        self._scopes: dict[tuple[SiteKey, ...], int] = {}
        """Numbers of sets of sites. They stay, as those of kinds do: compiled graphs are found by them."""

    def of(self, name: str) -> tuple[Family, Member]:
        """Return the family of a stacked delta, and its member."""
        kind = self._stacks.kind(name)
        found = self._members.get(kind)
        if found is None:
            found = self._members[kind] = self._join(name, kind)
        return found

    def known(self, name: str) -> tuple[Family, Member] | None:
        """Return the family of a delta, if one of its kind is a member."""
        return self._members.get(self._stacks.kind(name))

    def forget(self) -> None:
        """Forget all families, after tensors moved."""
        self._families.clear()
        self._members.clear()

    def _join(self, name: str, kind: Kind) -> tuple[Family, Member]:
        patterns, at = dict[SiteKey, Any](), dict[SiteKey, Part]()
        stack = self._stacks.of(name)
        for host, placements in self._builder.placements[name].items():
            for placement in placements:
                key = site_key(placement)
                patterns[key], at[key] = self._at(host, placement, stack)
        family = next((f for f in self._families if f.method == kind.method and f.takes(patterns)), None)
        if family is None:
            family = Family(kind.method, _number(kind))
            self._families.append(family)
        scope = self._scopes.setdefault(tuple(patterns), len(self._scopes))
        return family, family.join(kind, patterns, at, scope)

    def _at(self, host: str, placement: Placement, stack: Stack) -> tuple[Any, Part]:
        planned, method = placement.planned, methods()[placement.method]
        probability, homes = method.dropout(planned.params), homes_of(planned, stack)
        flats = [stack.flats[stack.layout.slots[home.key].group] for home in homes.values()]
        where = (*((flat.dtype, flat.device) for flat in flats), planned.site.stream, placement.arguments)
        shapes = tuple((spec.name, spec.shape) for spec in planned.tensors)
        if placement.lowered or method.attends or placement.virtual_tokens:
            return (placement.method, planned.params, shapes, where), Part(homes, (), False, probability)
        module = self._builder.modules[host]
        link = replace(self._builder.link(placement, module)[0], per_row=True)
        open_call = call_form(type(module), planned.site)[0] is None
        found = formula(link, open_call)
        # Inside of what is mapped over rows, all drop alike.
        alike = probability if found.drops_own else None
        return (pattern(link, open_call, shapes), alike, where), Part(homes, found.factors, found.drops, probability)


def _number(kind: Kind) -> int:
    """Return a number that no other kind of this process has, in the order of first use."""
    found = _NUMBERS.get(kind)
    return _NUMBERS.setdefault(kind, next(_NEXT)) if found is None else found  # one number, whatever thread is first


def reach(names: Iterable[str], found: Mapping[str, tuple[Family, Member]], family: Family) -> Place:
    """Return the place of a family for rows that may have these of its deltas."""
    members = sorted({found[name][1].number for name in names})
    scopes = sorted({family.members[number].scope for number in members})
    return Place(family, tuple(scopes), tuple(members))
