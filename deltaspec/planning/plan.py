"""The plan: what `compile` will do, as data that can be printed, compared, hashed and locked."""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING, Any

from deltaspec.language.load import load
from deltaspec.language.model import DeltaSpec
from deltaspec.planning.planned import PlannedDelta, PlannedDeltas
from deltaspec.planning.text import coloured, plain, plan_data

if TYPE_CHECKING:
    from rich.text import Text


class Plan(PlannedDeltas):
    """What `compile` will do: spec × model, as data.

    Two plans are equal when they make the same thing, that is when their fingerprints are.
    """

    @cached_property
    def _spec_of(self) -> dict[str, tuple[DeltaSpec, slice]]:
        """Spec of each delta, and the part of it that makes sense alone."""
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
        return plan_data(self)

    def __str__(self) -> str:
        return plain(self)

    def __rich__(self) -> Text:
        return coloured(self)
