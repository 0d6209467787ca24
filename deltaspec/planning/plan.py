"""The plan: what `compile` will do, as data that can be printed, compared, hashed and locked."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from deltaspec.backbone.fingerprint import digest, structure_fingerprint
from deltaspec.planning.planned import PlannedDelta, _identity, fraction

if TYPE_CHECKING:
    from rich.text import Text

    from deltaspec.backbone.table import ModuleTable
    from deltaspec.language.model import DeltaSpec
    from deltaspec.planning.planned import PlannedSite


@dataclass(frozen=True, eq=False)
class Plan:
    """What `compile` will do: spec × model, as data.

    Two plans are equal when they make the same thing, that is when their fingerprints are.
    """

    deltas: tuple[PlannedDelta, ...]
    """In order of application."""
    specs: tuple[DeltaSpec, ...]
    """The specs it was made from, with ranks in place of budgets."""
    table: ModuleTable
    checks: tuple[str, ...] = ()
    """The specs' expectations that were met, with the numbers."""
    notes: tuple[str, ...] = ()
    proven: bool = True
    """A forward was run and reached every site; else the compiled model's first forward is watched."""

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

    @cached_property
    def _spec_of(self) -> dict[str, tuple[DeltaSpec, slice]]:
        """Where each delta stands: its spec, and the part of it that makes sense alone."""
        found = {}
        for spec in self.specs:
            linked = any(delta.sources for delta in spec.deltas)
            for index, delta in enumerate(spec.deltas):
                found[delta.name] = spec, slice(None) if linked else slice(index, index + 1)
        return found

    def parts(self) -> tuple[Plan, ...]:
        """Return one plan a spec, as if each had been planned alone."""
        if len(self.specs) == 1:
            return (self,)
        return tuple(self._part(tuple(self._by_name[delta.name] for delta in spec.deltas), spec) for spec in self.specs)

    def alone(self, name: str) -> Plan:
        """Return the plan of one delta alone, or of all deltas of its spec where some are derived from others."""
        from deltaspec.language.load import load

        data = self.document(name)
        return self._part(tuple(self[delta["name"]] for delta in data["deltas"]), load(data))

    def document(self, name: str) -> dict[str, Any]:
        """Return the resolved spec of that plan."""
        spec, part = self._spec_of[name]
        return spec.model_copy(update={"deltas": spec.deltas[part], "expect": None}).to_data()

    def _part(self, deltas: tuple[PlannedDelta, ...], spec: DeltaSpec) -> Plan:
        """Return a plan for the same model."""
        part = Plan(deltas, (spec,), self.table)
        part.__dict__["structure"] = self.structure
        return part

    def to_dict(self) -> dict[str, Any]:
        """Return the plan as JSON data, sites folded over layers."""
        from deltaspec.planning.text import plan_data

        return plan_data(self)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Plan) and self.fingerprint == other.fingerprint

    def __hash__(self) -> int:
        return hash(self.fingerprint)

    def __str__(self) -> str:
        from deltaspec.planning.text import plain

        return plain(self)

    def __rich__(self) -> Text:
        from deltaspec.planning.text import coloured

        return coloured(self)
