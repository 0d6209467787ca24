"""One delta of a spec on one model: its sites, their parameters and tensors, and why any of them cannot be."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field, replace

from deltaspec.backbone.observations import Observations
from deltaspec.backbone.table import ModuleTable, Row
from deltaspec.diagnostics.findings import Diagnostic, Path
from deltaspec.diagnostics.wording import counted
from deltaspec.language.model import DeltaEntry, DeltaSpec
from deltaspec.language.selectors import Selector
from deltaspec.methods.base import Method
from deltaspec.methods.declarations import MethodParams, Site, TensorSpec
from deltaspec.methods.matrices import as_matrices, site_tensors
from deltaspec.methods.registry import methods
from deltaspec.methods.shared.shapes import static_widths
from deltaspec.names.folding import shown
from deltaspec.planning.budget import choose_rank
from deltaspec.planning.defaults import cross_attention_note
from deltaspec.planning.fixed import refuse_fixed
from deltaspec.planning.planned import PlannedDelta, PlannedSite
from deltaspec.planning.streams import refuse_stream, with_stream
from deltaspec.planning.weight_forms import refuse_computed, refuse_packed
from deltaspec.selection.select import select
from deltaspec.selection.subtree import Subtrees

Place = tuple[Row, str | None]
"""A module, or one parameter of it."""
Candidate = tuple[Site, MethodParams, int | None]
"""A site with its parameters and the override that gave them."""


@dataclass(slots=True)
class Placer:
    """Finds the sites of one delta, collecting findings and notes on the way; a rank goes into `spec` for a budget."""

    spec: DeltaSpec
    index: int
    table: ModuleTable
    observations: Observations
    findings: list[Diagnostic]
    notes: list[str]
    rows: dict[str, Row] = field(init=False)
    """The table's modules by FQN."""

    def __post_init__(self) -> None:
        self.rows = {row.fqn: row for row in self.table.rows}

    @property
    def entry(self) -> DeltaEntry:
        """The delta's entry in the spec."""
        return self.spec.deltas[self.index]

    @property
    def method(self) -> Method:
        """The delta's method."""
        return methods()[self.entry.method]

    def place(self) -> PlannedDelta:
        """Plan the delta. Where there are findings, the result holds the sites that could be planned."""
        places = self.target()
        overrides = self._overrides(places)
        variants = [self.entry.params_with(override) for override in self.entry.overrides]
        sites = [self._candidate(place, overrides, variants) for place in places]
        choice = choose_rank(self.method, self.entry.params, sites, self.table.parameters)
        if choice is not None:  # from here on, and in the plan's copy of the spec, it is a number
            self.spec = self.spec.with_params(self.index, choice.put(self.entry.params))
            sites = [(site, choice.put(params), override) for site, params, override in sites]
            if choice.problem is not None:
                self._find("DS408", choice.problem, choice.suggestion, ("params", choice.name, "budget"))
        entry = self.entry
        sites = self._refuse([*sites, *self._tied_places(sites)])
        if refusal := self.method.agree([(site, params) for site, params, _ in sites]):
            self._find("DS402", refusal.reason, refusal.suggestion)
        planned = tuple(
            PlannedSite(site, params, _in_dtype(site_tensors(self.method, site, params), entry.dtype), override)
            for site, params, override in sites
        )
        self._note_ties(planned)
        if entry.dtype is not None:
            self.notes.append(f"its tensors are {entry.dtype}")
        if not planned and not self.findings:
            self.notes.append("no module matches its optional selectors: this delta is empty")
        line, _ = self.spec.locate(("deltas", self.index))
        return PlannedDelta(
            name=entry.name,
            method=entry.method,
            attached=entry.attached,
            params=entry.params,
            sites=planned,
            seed=self.spec.seed,
            spec=self.spec.name,
            location=f"{self.spec.name}:{line}" if line else self.spec.name,
            budget=None if choice is None else (choice.name, str(choice.budget)),
            notes=tuple(self.notes),
        )

    def _find(self, code: str, message: str, suggestion: str | None, path: Path = ("target",)) -> None:
        text = f"delta {self.entry.name!r}: {message}"
        self.findings.append(self.spec.diagnostic(code, text, ("deltas", self.index, *path), suggestion))

    def target(self) -> list[Place]:
        """Return the places that the delta's target means, in the order of the model's modules."""
        if self.entry.target is None:
            return self._expanded((row, None) for row in self._default_rows())
        chooser = self.method.role_choice
        if chooser is not None and getattr(self.entry.params, chooser) is not None:
            message = f"`{chooser}` chooses the default target, and this delta names a target of its own"
            self._find("DS402", message, "leave out one of the two", ("params", chooser))
        return self._select(self.entry.target)

    def _default_rows(self) -> list[Row]:
        rows = [row for row in self.table.rows if self.method.is_default(row, self.entry.params)]
        self.notes += cross_attention_note(self.method.roles(self.entry.params), self.table)
        if not rows:
            name = self.table.model_type or self.table.model_class
            if not any(row.roles for row in self.table.rows):
                if self.method.attends and (found := [row for row in self.table.rows if row.attends]):
                    return found
                message, hint = f"the roles of {name} are not known", "name the modules: target: {path: …}"
            else:
                roles = self.method.roles(self.entry.params)
                message = f"{name} has none of the default roles of {self.entry.method} ({', '.join(roles)})"
                known = sorted({role for row in self.table.rows for role in row.roles})
                hint = f"give a target; roles here: {', '.join(known)}"
            self._find("DS350", f"no target is given, and {message}", hint, ("method",))
        return rows

    def _select(self, selector: Selector) -> list[Place]:
        matches, findings = select(selector, self.table, self.spec.selectors, self.spec)
        self.findings += findings
        return self._expanded((match.row, match.parameter) for match in matches)

    def _expanded(self, places: Iterable[Place]) -> list[Place]:
        """Put modules with parameters for whole subtrees where the method descends; each place once."""
        found: dict[tuple[str, str | None], Place] = {}
        subtrees = Subtrees(self.table)
        for row, parameter in places:
            descends = parameter is None and self.method.descends and row.children
            below = [r for r in subtrees.of(row) if self.method.descends_to(r)] if descends else []
            for taken in below or (row,):
                found[taken.fqn, parameter] = (taken, parameter)
        if self.method.descends:  # a parameter of a module that is taken whole
            found = {key: place for key, place in found.items() if key[1] is None or (key[0], None) not in found}
        return sorted(found.values(), key=lambda place: (subtrees.order[place[0].fqn], place[1] or ""))

    def _overrides(self, places: list[Place]) -> dict[tuple[str, str | None], int]:
        """Return which override each place gets: the first that matches."""
        chosen: dict[tuple[str, str | None], int] = {}
        for number, override in enumerate(self.entry.overrides):
            before = len(self.findings)
            matched = {(row.fqn, parameter) for row, parameter in self._select(override.match)}
            keys = [(row.fqn, parameter) for row, parameter in places]
            mine = [key for key in keys if key in matched or (key[0], None) in matched]
            fresh = [key for key in mine if key not in chosen]
            chosen |= dict.fromkeys(fresh, number)
            if fresh or len(self.findings) > before or not places or override.match.optional:
                continue
            message = (
                f"override {number + 1} applies to no site of this delta, which has {counted(len(places), 'site')}"
            )
            hint = "an earlier override takes every site it matches; the first match wins, so put it first"
            if not mine:
                there = shown(name(row, p) for row, p in places)
                hint = f"it matches {counted(len(matched), 'site')}; the delta's sites: {there}"
            self._find("DS405", message, hint, ("overrides", number, "match"))
        return chosen

    def _candidate(
        self, place: Place, overrides: dict[tuple[str, str | None], int], variants: list[MethodParams]
    ) -> Candidate:
        override = overrides.get((place[0].fqn, place[1]))
        params = self.entry.params if override is None else variants[override]
        return self.site(*place, params), params, override

    def site(self, row: Row, parameter: str | None, params: MethodParams) -> Site:
        """Describe a place, with what the forward pass showed of it, and what a formula of these params reads there."""
        seen = self.observations.of(row)
        in_width, width = static_widths(row)
        if seen is None:
            site = Site(row, parameter, in_width, width)
        else:
            in_width = in_width if seen.in_width is None else seen.in_width
            width = width if seen.width is None else seen.width
            # A module that is called and read besides takes a method around its call; a changed weight must reach both.
            host = None if seen.called and self.method.promises.weight is None else seen.host
            site = Site(row, parameter, in_width, width, host, seen.reads, seen.attention, seen.dims, moves=seen.moves)
        if not row.faithful and site.host is None and parameter is None and self.method.promises.weight is not None:
            site = replace(site, host=row.fqn)  # only its weight can be changed, not what its kind makes of it
        if (stream := self.method.stream(params)) is not None:
            site = with_stream(site, stream, self.rows, self.observations)
        return as_matrices(site) if parameter is not None and self.method.matrices else site

    def _tied_places(self, sites: list[Candidate]) -> list[Candidate]:
        """Add the other places of a tied parameter that the method trains as one tensor (a tensor with a `key`)."""
        owners = {p.fqn: (row, p.name) for row in self.table.rows for p in row.parameters if p.tied}
        taken = {(site.row.fqn, site.parameter) for site, _, _ in sites}
        added = []
        for site, params, override in sites:
            if not any(p.tied for p in site.row.parameters) or self.method.refuse(site, params) is not None:
                continue
            shared = [t.init.source for t in self.method.tensors(site, params) if t.key is not None]
            partners = [fqn for p in site.row.parameters if p.fqn in shared for fqn in p.tied]
            new = []
            for row, parameter in (owners[fqn] for fqn in partners):
                if taken.isdisjoint({(row.fqn, None), (row.fqn, parameter)}):
                    taken.add((row.fqn, parameter))
                    added.append((self.site(row, parameter, params), params, override))
                    new.append(name(row, parameter))
            if new:
                self.notes.append(f"{site.fqn} is tied to {', '.join(new)}: one tensor, trained for all of them")
        return added

    def _refuse(self, sites: list[Candidate]) -> list[Candidate]:
        """Drop the sites that cannot be, with one finding a reason, not one a layer."""
        refused: dict[tuple[str, str], list[tuple[str, str, str]]] = {}
        kept = []
        for site, params, override in sites:
            code, reason, hint = self.why_not(site, params)
            if code:
                refused.setdefault((code, re.sub(r"\.\d+\b", ".*", reason)), []).append((site.fqn, reason, hint))
            else:
                kept.append((site, params, override))
        for (code, _), group in refused.items():
            names = shown(fqn for fqn, _, _ in group)
            self._find(code, f"{group[0][1]} ({counted(len(group), 'site')}: {names})", group[0][2])
        return kept

    def why_not(self, site: Site, params: MethodParams) -> tuple[str, str, str]:
        """Return code, reason and way out where this site cannot be; empty texts where it can."""
        if why := refuse_computed(self.method, site, params):
            return why
        stream = self.method.stream(params)
        if stream is not None and (why := refuse_stream(site, stream, self.rows, self.observations)):
            return why
        if refusal := self.method.refuse(site, params):
            # A method that asks for example_inputs lacks what a forward would have shown.
            failed = self.observations.failure if "example_inputs" in refusal.suggestion else None
            told = f"; no forward could be run here: {failed}" if failed else ""
            return "DS402", refusal.reason, f"{refusal.suggestion}{told}"
        if why := refuse_packed(self.method, site, params):
            return why
        if self.method.promises.weight != "replace" and any(p.dtype.startswith("complex") for p in site.row.parameters):
            reason = f"the parameters of this {site.row.type} are complex, and {self.method.name} is real"
            return "DS402", reason, "leave it out, or use method full"
        if not self._reached(site.row):
            called = self._tied_and_reached(site)
            shared = site.stack is None and all(t.key is not None for t in self.method.tensors(site, params))
            if not (called and shared):
                reason = f"no forward pass reaches this {site.row.type}, so a delta there would do nothing"
                hint = "leave it out, or pass example_inputs that reach it"
                if called:
                    hint = f"its weight is tied to that of {called[0]}, which runs: select that one"
                return "DS403", reason, hint
        seen = self.observations.of(site.row)
        if seen is not None and (useless := seen.useless(site.row.type, self.method.promises.weight is not None)):
            return "DS403", *useless
        if why := refuse_fixed(self.method, site, params, self.table):
            return why
        bypass = site.host if site.host is not None or seen is None else seen.bypass
        if bypass is not None and self.method.promises.weight is None:
            host = bypass or self.table.model_class
            reads = f"{host} reads this {site.row.type}'s weights without calling it"
            reason = f"{reads}, so {self.method.name} is bypassed"
            weighty = [m.name for m in methods().values() if m.promises.weight is not None]
            return "DS404", reason, f"use a method that changes the weight ({', '.join(weighty)}), or put it on {host}"
        return "", "", ""

    def _reached(self, row: Row) -> bool:
        """Return whether the module was called or its weights were read; True where no forward could run."""
        seen = self.observations.of(row)
        return seen is None or seen.called or seen.host is not None

    def _tied_and_reached(self, site: Site) -> list[str]:
        """Name the modules that run and hold the very same parameters as this site."""
        tied = {fqn for p in site.row.parameters if site.parameter in (None, p.name) for fqn in p.tied}
        owners = [row for row in self.table.rows if tied and any(p.fqn in tied for p in row.parameters)]
        return [row.fqn for row in owners if self._reached(row)]

    def _note_ties(self, planned: tuple[PlannedSite, ...]) -> None:
        if self.method.promises.weight == "replace":
            return
        for site in (planned_site.site for planned_site in planned):
            for parameter in site.row.parameters:
                if parameter.tied and site.parameter in (None, parameter.name):
                    others = ", ".join(parameter.tied)
                    self.notes.append(f"{parameter.fqn} is tied to {others}; the delta changes {site.fqn} only")


def name(row: Row, parameter: str | None) -> str:
    """Name a place."""
    return Site(row, parameter).fqn


def _in_dtype(tensors: tuple[TensorSpec, ...], dtype: str | None) -> tuple[TensorSpec, ...]:
    return tensors if dtype is None else tuple(t if t.dtype else replace(t, dtype=dtype) for t in tensors)
