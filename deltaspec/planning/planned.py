"""The plan as data: which deltas change which sites with which tensors. Frozen, hashable, printable."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

from deltaspec.backbone.fingerprint import digest, structure_fingerprint
from deltaspec.backbone.table import ModuleTable
from deltaspec.language.passes import ALL

if TYPE_CHECKING:
    from deltaspec.language.derivation import Derivation
    from deltaspec.language.model import DeltaSpec
    from deltaspec.language.training import Train
    from deltaspec.methods.declarations import MethodParams, Site, TensorSpec


@dataclass(frozen=True, slots=True)
class PlannedSite:
    """One site with the tensors one delta puts there."""

    site: Site
    params: MethodParams
    """Parameters of the delta, with the override that applies here."""
    tensors: tuple[TensorSpec, ...]
    override: int | None = None
    """Index in the delta of the override that applies here."""

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
    """Seed of the initial values of its tensors."""
    spec: str
    """Name of the document it comes from."""
    location: str
    """Place of the delta: `file:line`, or the file alone."""
    checks: tuple[str, ...] = ()
    """The delta's expectations that were met, with the numbers."""
    notes: tuple[str, ...] = ()
    budget: tuple[str, str] | None = None
    """Name of the parameter that was chosen for a budget, and the budget in words."""
    derived: Derivation | None = None
    """Derivation of a delta that is built from others, and so not trained."""
    matrix: Mapping[str, Any] = field(default_factory=dict)
    """Values that it has from a matrix, by parameter or hint."""
    train: Train | None = None
    """Hints for training it."""
    let_pass: tuple[str, ...] = ()
    """Differences between the backbone and the one that it was saved for, which `match` let pass when it was read."""
    passes: frozenset[str] = ALL
    """Names of the passes over training steps that its spec lets change how it runs."""

    @property
    def trainable(self) -> int:
        """Number of trainable values; tensors that several sites share count once."""
        return count_trainable(self.sites)


@dataclass(frozen=True, slots=True)
class MemoryUse:
    """What a step of training was estimated to take, where a spec expects something of it."""

    most: str
    """The bound, as the spec has it."""
    conditions: Mapping[str, Any]
    """What it is for: batch, length, optimizer and so on."""
    bytes: int
    """The estimate."""


@dataclass(frozen=True, eq=False)
class PlannedDeltas:
    """All deltas of a plan, the model they are for, and what was found out about them: a plan's data.

    Equal to others that make the same thing, that is by their fingerprints.
    """

    deltas: tuple[PlannedDelta, ...]
    """All deltas, in order of application."""
    specs: tuple[DeltaSpec, ...]
    """The specs it was made from, with ranks in place of budgets."""
    table: ModuleTable
    checks: tuple[str, ...] = ()
    """The specs' expectations that were met, with the numbers."""
    notes: tuple[str, ...] = ()
    proven: bool = True
    """Whether a forward was run and reached every site; else the compiled model's first forward is watched."""
    unused: frozenset[str] = frozenset()
    """FQNs of modules that take no part in what the model gives, so far as the forward showed it."""
    passes: frozenset[str] = ALL
    """Names of the passes over training steps that are wanted in the model, whatever a spec allows."""
    memory: tuple[MemoryUse | None, ...] = ()
    """Memory of a step of training, by the specs; None for those that expect nothing of it; empty: no spec does."""

    @property
    def model_class(self) -> str:
        """Class name of the backbone."""
        return self.table.model_class

    @property
    def model_type(self) -> str | None:
        """`config.model_type` of a transformers backbone."""
        return self.table.model_type

    @property
    def base_parameters(self) -> int:
        """Number of values in the backbone's parameters, tied ones once."""
        return self.table.parameters

    @property
    def sites(self) -> tuple[PlannedSite, ...]:
        """All sites of all deltas, delta by delta."""
        return tuple(site for delta in self.deltas for site in delta.sites)

    @cached_property
    def trainable(self) -> int:
        """Number of trainable values of all deltas."""
        return sum(delta.trainable for delta in self.deltas)

    @property
    def fraction(self) -> float:
        """Trainable values over the backbone's parameters."""
        return fraction(self.trainable, self.base_parameters)

    @cached_property
    def structure(self) -> str:
        """Fingerprint of the backbone's structure; its weights and their dtype do not matter."""
        return structure_fingerprint(self.table)

    @cached_property
    def fingerprint(self) -> str:
        """`sha256:…` over everything that decides what compile makes; expectations and comments do not."""
        return digest([self.structure, *(_identity(delta) for delta in self.deltas)])

    def __getitem__(self, name: str) -> PlannedDelta:
        """Return a delta by name. Raises KeyError, naming the known ones."""
        if name in self._by_name:
            return self._by_name[name]
        raise KeyError(f"no delta {name!r}; there are: {', '.join(self._by_name)}")

    @cached_property
    def _by_name(self) -> dict[str, PlannedDelta]:
        return {delta.name: delta for delta in self.deltas}

    def __eq__(self, other: object) -> bool:
        return isinstance(other, PlannedDeltas) and self.fingerprint == other.fingerprint

    def __hash__(self) -> int:
        return hash(self.fingerprint)


def count_trainable(sites: Iterable[PlannedSite]) -> int:
    """Count the trainable values of a delta's sites, shared tensors once."""
    counts = {t.key or (s.site.row.fqn, t.name): t.count for s in sites for t in s.tensors}
    return sum(counts.values())


def fraction(part: int, whole: int) -> float:
    """Return part / whole; 0 of nothing is 0."""
    return part / whole if whole else float(part > 0)


def _identity(delta: PlannedDelta) -> list[object]:
    """Return everything that decides what `compile` makes of a delta, as JSON data."""
    params: dict[int, object] = {}  # sites share a few params objects: dump each once
    sites: list[object] = []
    for planned in delta.sites:
        site = planned.site
        if id(planned.params) not in params:
            params[id(planned.params)] = planned.params.model_dump(mode="json")
        starts = ((t, [t.init.kind, t.init.value, t.init.source]) for t in planned.tensors)
        tensors = [[t.name, t.shape, start, t.buffer, t.dtype, t.key] for t, start in starts]
        sites.append([site.row.fqn, site.parameter, site.host, params[id(planned.params)], tensors])
    identity: list[object] = [delta.name, delta.method, delta.attached, delta.seed, sites]
    return identity if delta.derived is None else [*identity, delta.derived.to_data()]
