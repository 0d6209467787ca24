"""Placements: which modules' forwards change for a delta, and for which of its sites."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from deltaspec.language.passes import ALL
from deltaspec.methods.declarations import Site
from deltaspec.methods.registry import methods
from deltaspec.planning.planned import PlannedDelta, PlannedSite


@dataclass(frozen=True, slots=True)
class Placement:
    """One delta at one host module, in the order of the spec."""

    delta: str
    method: str
    planned: PlannedSite
    lowered: bool
    """Whether it works through the host's parameters instead of around its call."""
    passes: frozenset[str] = ALL
    """Names of the passes over training steps that may change how it runs."""

    @property
    def virtual_tokens(self) -> int:
        """Number of tokens that the delta puts in front of the input here."""
        return methods()[self.method].virtual_tokens(self.planned.params)

    @property
    def leads(self) -> bool:
        """Whether those tokens stand in front of padding on the left."""
        return methods()[self.method].leads(self.planned.params)

    @property
    def stays(self) -> bool:
        """Whether those tokens stay in what the model gives."""
        return methods()[self.method].stays(self.planned.params)

    @property
    def counted_tokens(self) -> int:
        """Number of positions that the delta takes in front of the tokens that are attended to here."""
        return methods()[self.method].counted_tokens(self.planned.params)

    @property
    def arguments(self) -> tuple[str, ...]:
        """Names of the host's arguments that the delta's formula reads."""
        return methods()[self.method].arguments(self.planned.site, self.planned.params)


class Placements(dict[str, dict[str, list[Placement]]]):
    """Placements of deltas, by host; worked out when they are first asked for."""

    def __init__(self, planned: Mapping[str, PlannedDelta], passes: frozenset[str] = ALL) -> None:
        """Take the names of the passes over training steps that are wanted in this model."""
        super().__init__()
        self.planned, self.passes = planned, passes

    def __missing__(self, name: str) -> dict[str, list[Placement]]:
        planned, found = self.planned[name], dict[str, list[Placement]]()
        method = methods()[planned.method]
        for site in planned.sites:
            folds = method.folds(site.site, site.params)
            placement = Placement(name, planned.method, site, folds, planned.passes & self.passes)
            found.setdefault(host_of(site.site), []).append(placement)
        self[name] = found
        return found

    def of(self, name: str) -> list[Placement]:
        """Return all placements of one delta."""
        return [placement for placements in self[name].values() for placement in placements]


def host_of(site: Site) -> str:
    """Return the FQN of the module whose forward changes for a site."""
    return site.row.fqn if site.host is None else site.host
