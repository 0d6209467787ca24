"""Inputs of other modules that formulas read: which module that is at a site, and whether it runs before."""

from __future__ import annotations

from collections.abc import Container, Mapping
from dataclasses import replace
from itertools import chain

from deltaspec.backbone.observations import Observations
from deltaspec.backbone.recorder import Observation
from deltaspec.backbone.table import Row
from deltaspec.diagnostics.wording import closest
from deltaspec.methods.declarations import Site
from deltaspec.methods.shared.shapes import static_widths
from deltaspec.names.paths import below


def with_stream(site: Site, path: str, rows: Mapping[str, Row], observations: Observations) -> Site:
    """Return the site with the module that a path means there, if there is one, and the width of what enters that."""
    read = meant(site.row.fqn, path, rows)
    if read is None:
        return site
    row = rows[read]
    seen = observations.seen(row)
    width = static_widths(row)[0] if seen is None or seen.in_width is None else seen.in_width
    return replace(site, stream=row.fqn, stream_width=width)


def refuse_stream(
    site: Site, path: str, rows: Mapping[str, Row], observations: Observations
) -> tuple[str, str, str] | None:
    """Return code, reason and way out where a site cannot read what enters the module that a path means."""
    if site.parameter is not None or site.host is not None:
        reason = f"what enters {path} is read where {site.fqn} is called, and this works on a weight there"
        return "DS585", reason, "select a module that is called"
    if site.stream is None:
        reason = f"nothing beside or around this {site.row.type} is called {path}"
        return "DS585", reason, _near(site.row.fqn, path, list(rows))
    seen, here = observations.seen(rows[site.stream]), observations.seen(site.row)
    if seen is None or here is None:  # no forward could be run: the first one will tell
        return None
    why = out_of_turn(site, path, seen, here)
    return None if why is None else ("DS585", why, way_out(site))


def out_of_turn(site: Site, path: str, read: Observation, here: Observation) -> str | None:
    """Return why a site cannot read what enters another module, by what a forward showed of both; None: it can."""
    if not read.called:
        return f"{path} is not called by the model, so nothing enters it"
    if not _in_turn(read, here):
        return f"{path} does not run once before each end of this {site.row.type}"
    pairs = zip(read.calls, here.calls, strict=True)
    if any(one.entering is None or one.entering != other.leaving for one, other in pairs):
        return f"what enters {path} has other positions than what leaves this {site.row.type}"
    return None


def way_out(site: Site) -> str:
    """Return what to do where a site cannot read what it names."""
    return f"name a module whose input is [..., width], as often as {site.row.type} runs and before it ends"


def meant(fqn: str, path: str, names: Container[str]) -> str | None:
    """Return which of these modules, the site's own apart, a path means at a site; None for none."""
    found = (below(outer, path) for outer in _outwards(fqn))
    return next((name for name in found if name in names and name != fqn), None)


def path_to(read: str, fqn: str, names: Container[str]) -> str:
    """Return the shortest path that means a module at a site."""
    segments = read.split(".")
    paths = (".".join(segments[start:]) for start in range(len(segments) - 1, -1, -1))
    return next((path for path in paths if meant(fqn, path, names) == read), read)


def _outwards(fqn: str) -> list[str]:
    """Return the modules that hold another, the innermost first."""
    segments = fqn.split(".")
    return [".".join(segments[:count]) for count in range(len(segments) - 1, -1, -1)]


def _in_turn(read: Observation, site: Observation) -> bool:
    """Return whether a module was entered once before each end of another, and after the end before."""
    ends = [0, *(call.left for call in site.calls)]
    turns = zip(read.calls, ends, ends[1:], strict=False)
    return len(read.calls) == len(site.calls) and all(before < call.entered < end for call, before, end in turns)


def _near(fqn: str, path: str, names: list[str]) -> str:
    """Name the module that a path is most likely a misspelling of, or those beside the site."""
    inside = [[n[len(lead) :] for n in names if n.startswith(lead)] for lead in map(_lead, _outwards(fqn))]
    if (found := next(filter(None, (closest(path, paths) for paths in inside)), None)) is not None:
        return f"did you mean {found!r}?"
    beside = [path for path in dict.fromkeys(chain.from_iterable(inside)) if path and "." not in path]
    return f"modules around it: {', '.join(beside[:12])}"


def _lead(fqn: str) -> str:
    return f"{fqn}." if fqn else ""
