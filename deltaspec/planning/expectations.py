"""`expect`: what a spec's author counts on, compared with what the plan comes to."""

from __future__ import annotations

from collections.abc import Sequence
from math import floor

from deltaspec.backbone.table import ModuleTable, Row
from deltaspec.diagnostics.findings import Diagnostic
from deltaspec.diagnostics.wording import counted
from deltaspec.language.model import Count, DeltaSpec
from deltaspec.names.folding import shown
from deltaspec.names.paths import is_inside
from deltaspec.planning.planned import PlannedDelta, PlannedSite, fraction
from deltaspec.selection.select import Match, select

Result = tuple[tuple[str, ...], list[Diagnostic]]
"""Expectations that were met, in words, and findings about those that were not."""


def delta_checks(spec: DeltaSpec, index: int, delta: PlannedDelta) -> Result:
    """Compare one delta with its `expect`."""
    expect = spec.deltas[index].expect
    met: list[str] = []
    findings: list[Diagnostic] = []
    if expect is None:
        return (), []
    names = shown((site.fqn for site in delta.sites), most=8)
    for key, code, bounds, actual, noun in (
        ("sites", "DS501", expect.sites, len(delta.sites), "site"),
        ("trainable", "DS502", expect.trainable, delta.trainable, "trainable parameter"),
    ):
        if bounds is None:
            continue
        words = f"{counted(actual, noun)}, expected {_bounds(bounds)}"
        if _holds(bounds, actual):
            met.append(words)
        else:
            hint = f"change the selector or the expectation; the sites are {names}" if names else "it has no site"
            path = ("deltas", index, "expect", key)
            findings.append(spec.diagnostic(code, f"delta {delta.name!r} has {words}", path, hint))
    return tuple(met), findings


def spec_checks(spec: DeltaSpec, deltas: Sequence[PlannedDelta], table: ModuleTable, broken: bool) -> Result:
    """Compare a spec's own deltas with its `expect`; where a delta is `broken`, counts are left alone."""
    if spec.expect is None:
        return (), []
    met: list[str] = []
    findings: list[Diagnostic] = []
    if spec.expect.trainable is not None and not broken:
        for words, holds in _trainable(spec, sum(delta.trainable for delta in deltas), table):
            if holds:
                met.append(words)
            else:
                shares = ", ".join(f"{delta.name} {delta.trainable:,}" for delta in deltas)
                findings.append(spec.diagnostic("DS503", words, ("expect", "trainable"), f"by delta: {shares}"))
    for selector in spec.expect.untouched:
        matches, wrong = select(selector, table, spec.selectors, spec)
        findings += wrong
        clashes = 0
        for delta in deltas:
            inside = [site.fqn for site in delta.sites if any(_touches(site, match) for match in matches)]
            if inside:
                clashes += 1
                where = f"{counted(len(inside), 'site')}: {shown(inside)}"
                message = f"delta {delta.name!r} changes what should stay untouched ({where})"
                hint = f"leave it out of the delta's target: not: …; untouched are {shown(m.fqn for m in matches)}"
                findings.append(spec.diagnostic("DS504", message, selector.location, hint))
        if not clashes and not wrong:
            met.append(f"untouched: {shown(m.fqn for m in matches) or 'nothing matches (optional)'}")
    return tuple(met), findings


def _trainable(spec: DeltaSpec, actual: int, table: ModuleTable) -> list[tuple[str, bool]]:
    assert spec.expect is not None and spec.expect.trainable is not None
    bounds, base = spec.expect.trainable, table.parameters
    found = []
    if bounds.min is not None or bounds.max is not None:
        words = f"{counted(actual, 'trainable parameter')} in all, expected {_bounds(bounds)}"
        found.append((words, _holds(bounds, actual)))
    if bounds.max_fraction is not None:
        share, most = fraction(actual, base), bounds.max_fraction
        words = (
            f"{counted(actual, 'trainable parameter')} are {100 * share:.4g} % of the base's {base:,}, "
            f"expected at most {100 * most:.4g} % ({floor(most * base):,})"
        )
        found.append((words, share <= most))
    return found


def _touches(site: PlannedSite, match: Match) -> bool:
    """Return whether a site lies in a module, or changes a parameter, that should stay as it is."""
    row: Row = site.site.row
    if match.parameter is None:
        return any(is_inside(name, match.row.fqn) for name in (row.fqn, *row.aliases))
    return row.fqn == match.row.fqn and site.site.parameter in (None, match.parameter)


def _holds(bounds: Count, actual: int) -> bool:
    return (bounds.min is None or actual >= bounds.min) and (bounds.max is None or actual <= bounds.max)


def _bounds(bounds: Count) -> str:
    if bounds.min == bounds.max and bounds.min is not None:
        return f"{bounds.min:,}"
    if bounds.min is not None and bounds.max is not None:
        return f"{bounds.min:,} to {bounds.max:,}"
    return f"at least {bounds.min:,}" if bounds.min is not None else f"at most {bounds.max:,}"
