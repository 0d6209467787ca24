"""The plan: what `compile` will do, as data that can be printed, compared, hashed and locked."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

from deltaspec.language.model import DeltaEntry, DeltaSpec
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

    def with_sources(self, names: Iterable[str]) -> tuple[str, ...]:
        """Return these deltas and those that they are derived from, in order of application."""
        entries = {entry.name: entry for spec in self.specs for entry in spec.deltas}
        waiting, found = list(names), set[str]()
        while waiting:
            name = waiting.pop()
            if name not in found:
                found.add(name)
                waiting += entries[name].sources
        return tuple(delta.name for delta in self.deltas if delta.name in found)

    def alone(self, name: str, among: Collection[str] | None = None) -> Plan:
        """Return the plan of one delta alone, or of all deltas of its spec where some are derived from others.

        `among` leaves out what it does not name.
        """
        spec = self._spec(name, among)
        return self._part(tuple(self[delta.name] for delta in spec.deltas), spec)

    def document(self, name: str, among: Collection[str] | None = None) -> dict[str, Any]:
        """Return the resolved spec of that plan."""
        return self._spec(name, among).to_data()

    def _spec(self, name: str, among: Collection[str] | None) -> DeltaSpec:
        spec, part = self._spec_of[name]
        deltas = tuple(delta for delta in spec.deltas[part] if among is None or delta.name in among)
        used = _used(deltas, spec)
        selectors = {name: selector for name, selector in spec.selectors.items() if name in used}
        return spec.model_copy(update={"deltas": deltas, "selectors": selectors, "expect": None})

    def with_remarks(self, notes: Mapping[str, Sequence[str]], let_pass: Mapping[str, Sequence[str]]) -> Plan:
        """Return the plan with notes on deltas, and what was let pass when they were read, by their names."""
        deltas = []
        for delta in self.deltas:
            more = tuple(note for note in notes.get(delta.name, ()) if note not in delta.notes)
            passed = tuple(dict.fromkeys((*delta.let_pass, *let_pass.get(delta.name, ()))))
            deltas.append(replace(delta, notes=(*delta.notes, *more), let_pass=passed))
        return replace(self, deltas=tuple(deltas))

    def _part(self, deltas: tuple[PlannedDelta, ...], spec: DeltaSpec) -> Plan:
        """Return a plan for the same model."""
        uses = [use for own, use in zip(self.specs, self.memory, strict=False) if own is spec and use is not None]
        part = Plan(deltas, (spec,), self.table, passes=self.passes, memory=tuple(uses))
        part.__dict__["structure"] = self.structure
        return part

    def to_dict(self) -> dict[str, Any]:
        """Return the plan as JSON data, sites folded over layers."""
        return plan_data(self)

    def __str__(self) -> str:
        return plain(self)

    def __rich__(self) -> Text:
        return coloured(self)


def _used(deltas: Iterable[DeltaEntry], spec: DeltaSpec) -> set[str]:
    """Return the names of the spec's selectors that deltas refer to, through others, too."""
    targets = [delta.target for delta in deltas if delta.target is not None]
    waiting = [*targets, *(override.match for delta in deltas for override in delta.overrides)]
    found: set[str] = set()
    while waiting:
        for part in waiting.pop().walk():
            if part.ref is not None and part.ref not in found:
                found.add(part.ref)
                waiting.append(spec.selectors[part.ref])
    return found
