"""The plan as data: which deltas change which sites with which tensors. Frozen, hashable, printable."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from deltaspec.language.derivation import Derivation
    from deltaspec.methods.declarations import MethodParams, Site, TensorSpec


@dataclass(frozen=True, slots=True)
class PlannedSite:
    """One site with the tensors one delta puts there."""

    site: Site
    params: MethodParams
    """The delta's, with the override that applies here."""
    tensors: tuple[TensorSpec, ...]
    override: int | None = None
    """Index of that override in the delta."""

    @property
    def fqn(self) -> str:
        """Name of the site."""
        return self.site.fqn


@dataclass(frozen=True, slots=True)
class PlannedDelta:
    """One delta with all its sites, in the order of the model's modules."""

    name: str
    method: str
    attached: bool
    params: MethodParams
    sites: tuple[PlannedSite, ...]
    seed: int
    """Of the initial values of its tensors."""
    spec: str
    """Name of the document it comes from."""
    location: str
    """`file:line`, or the file alone."""
    checks: tuple[str, ...] = ()
    """The delta's expectations that were met, with the numbers."""
    notes: tuple[str, ...] = ()
    budget: tuple[str, str] | None = None
    """Name of the parameter that was chosen for a budget, and the budget in words."""
    derived: Derivation | None = None
    """What it is built from, for one that is not trained."""

    @property
    def trainable(self) -> int:
        """Number of trainable values; tensors that several sites share count once."""
        return count_trainable(self.sites)


def count_trainable(sites: Iterable[PlannedSite]) -> int:
    """Count the trainable values of a delta's sites, shared tensors once."""
    counts = {t.key or (s.site.row.fqn, t.name): t.count for s in sites for t in s.tensors}
    return sum(counts.values())


def fraction(part: int, whole: int) -> float:
    """Return part / whole; 0 of nothing is 0."""
    return part / whole if whole else float(part > 0)


def _identity(delta: PlannedDelta) -> list[object]:
    params: dict[int, object] = {}  # sites share a few params objects: dump each once
    sites: list[object] = []
    for planned in delta.sites:
        site = planned.site
        if id(planned.params) not in params:
            params[id(planned.params)] = planned.params.model_dump(mode="json")
        tensors = [
            [t.name, t.shape, [t.init.kind, t.init.value, t.init.source], t.buffer, t.dtype, t.key]
            for t in planned.tensors
        ]
        sites.append([site.row.fqn, site.parameter, site.host, params[id(planned.params)], tensors])
    identity: list[object] = [delta.name, delta.method, delta.attached, delta.seed, sites]
    return identity if delta.derived is None else [*identity, delta.derived.to_data()]
