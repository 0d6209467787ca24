"""Verdicts: why a delta does, or does not, change one module of a model."""

from __future__ import annotations

from dataclasses import dataclass, replace

from deltaspec.backbone.observations import Observations
from deltaspec.backbone.table import ModuleTable, Row
from deltaspec.diagnostics.findings import DeltaSpecError, Diagnostic
from deltaspec.diagnostics.wording import closest, show_path
from deltaspec.language.model import DeltaSpec
from deltaspec.names.paths import is_inside
from deltaspec.planning.derived import sources_first
from deltaspec.planning.planned import PlannedSite
from deltaspec.planning.sites import Placer
from deltaspec.planning.text import show_params
from deltaspec.selection.clock import timed
from deltaspec.selection.explain import Reason, explain


@dataclass(frozen=True, slots=True)
class Verdict:
    """The verdict of one delta on one module."""

    delta: str
    method: str
    taken: bool
    outcome: str
    """The tensors that are put there, in words, or who refused it."""
    location: str
    """Place of the delta: `file:line:column`."""
    reasons: tuple[tuple[Reason, str], ...]
    """Each condition of the target with its verdict, and its place in the document."""


def find_row(table: ModuleTable, name: str) -> Row:
    """Return the module of this name, or the one that owns the parameter of this name.

    Raises DeltaSpecError (DS351) with the nearest name where there is none.
    """
    known: dict[str, Row] = {}
    for row in table.rows:
        known |= dict.fromkeys((row.fqn, *row.aliases), row) | {p.fqn: row for p in row.parameters}
    if name in known:
        return known[name]
    near = closest(name, known)
    hint = f"did you mean {near!r}?" if near else "`deltaspec tree` shows the names"
    message = f"{table.model_class} has no module or parameter {name!r:.200}"
    raise DeltaSpecError([Diagnostic("DS351", message, "<model>", suggestion=hint)])


def verdicts(spec: DeltaSpec, table: ModuleTable, observations: Observations, row: Row) -> list[Verdict]:
    """Return what each delta of a spec says about a module."""
    with timed():
        return _verdicts(spec, table, observations, row)


def _verdicts(spec: DeltaSpec, table: ModuleTable, observations: Observations, row: Row) -> list[Verdict]:
    found: dict[str, Verdict] = {}
    for index in sources_first(spec):
        entry = spec.deltas[index]
        if not entry.sources:
            found[entry.name] = _verdict(Placer(spec, index, table, observations, [], []), row)
            continue
        source = found[next(iter(entry.sources))]  # all of them have the same sites
        outcome = f"as its source {source.delta}: {source.outcome}"
        place = _place(spec, ("deltas", index))
        found[entry.name] = replace(source, delta=entry.name, method="derived", outcome=outcome, location=place)
    return [found[entry.name] for entry in spec.deltas]


def _verdict(placer: Placer, row: Row) -> Verdict:
    delta = placer.place()
    planned = [site for site in delta.sites if site.site.row.fqn == row.fqn]
    selected = [place for place in placer.target() if place[0].fqn == row.fqn]
    reasons = tuple((reason, _place(placer.spec, reason.location)) for reason in _reasons(placer, row, bool(selected)))
    if planned:
        outcome = "; ".join(_words(site) for site in planned)
    elif selected:
        params = placer.entry.params
        refusals = [placer.why_not(placer.site(*place, params), params) for place in selected]
        code, reason, hint = next((r for r in refusals if r[0]), ("", "refused with the params of an override", ""))
        outcome = f"selected, but {reason}" + (f" [{code}]; {hint}" if code else "")
    else:
        outcome = "not selected"
    place = _place(placer.spec, ("deltas", placer.index))
    return Verdict(delta.name, delta.method, bool(planned), outcome, place, reasons)


def _reasons(placer: Placer, row: Row, selected: bool) -> list[Reason]:
    target = placer.entry.target
    if target is None:
        wanted = placer.method.roles(placer.entry.params)
        text = f"default roles of {placer.entry.method} ({', '.join(wanted)})"
        why = f"its roles are {', '.join(row.roles)}" if row.roles else "it has no role"
        accepted = selected or placer.method.is_default(row, placer.entry.params)
        return [Reason(text, ("deltas", placer.index, "method"), accepted, why)]
    own = explain(target, placer.table, row, placer.spec.selectors)
    if not selected or all(reason.accepted for reason in own if not reason.depth):
        return own
    for above in placer.table.rows:  # a method that takes whole subtrees
        if above.children and any(is_inside(name, above.fqn) for name in (row.fqn, *row.aliases)):
            inherited = explain(target, placer.table, above, placer.spec.selectors)
            if all(reason.accepted for reason in inherited if not reason.depth):
                return [Reason(f"part of {above.fqn}", target.location, True, "which is selected"), *inherited]
    return own


def _words(site: PlannedSite) -> str:
    tensors = ", ".join(f"{t.name} {list(t.shape)}" for t in site.tensors)
    override = f" (override {site.override + 1})" if site.override is not None else ""
    through = f", through the weight that {site.site.host or 'the model'} reads" if site.site.host is not None else ""
    parameter = f" on {site.site.parameter}" if site.site.parameter else ""
    params = show_params(site.params)
    return f"taken{parameter}{f' with {params}' if params else ''}{override}: {tensors}{through}"


def _place(spec: DeltaSpec, path: tuple[str | int, ...]) -> str:
    line, column = spec.locate(path)
    return f"{spec.name}:{line}:{column}" if line else f"{spec.name}:{show_path(path)}"
