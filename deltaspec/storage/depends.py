"""What trained deltas depend on: all of the backbone but what they themselves put in the place of it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from deltaspec.methods.registry import methods
from deltaspec.planning.planned import PlannedDelta, PlannedSite

Replaced = Mapping[str, frozenset[int] | None]
"""Tensors that deltas stand for, by FQN: these rows of them, or all (None)."""


def replaced(deltas: Iterable[PlannedDelta]) -> dict[str, frozenset[int] | None]:
    """Return what these deltas hold trained copies of."""
    found: dict[str, frozenset[int] | None] = {}
    for delta in deltas:
        if methods()[delta.method].promises.weight != "replace":
            continue
        for planned in delta.sites:
            for name, rows in _copies(planned):
                before = found.get(name, frozenset())
                found[name] = None if rows is None or before is None else before | rows
    return found


def reads(delta: PlannedDelta, before: Replaced, others: Replaced) -> list[str]:
    """Return which of the tensors that deltas stand for this one works on as they are in the backbone.

    `before` is what deltas before it stand for: it works on their copies.
    """
    if methods()[delta.method].promises.weight == "replace":
        return []
    own = (p for site in delta.sites for p in site.site.row.parameters if site.site.parameter in (None, p.name))
    return [name for name in dict.fromkeys(p.fqn for p in own) if name in others and name not in before]


def _copies(planned: PlannedSite) -> Iterable[tuple[str, frozenset[int] | None]]:
    """Return the tensors of the backbone that a site's tensors were copied from, and the rows of each."""
    site = planned.site
    ties = {p.fqn: p.tied for p in site.row.parameters}
    for spec in planned.tensors:
        source = spec.init.source
        if source is None:
            continue
        rows = None if spec.init.rows is None else frozenset(spec.init.rows)
        yield source, rows
        if spec.key is not None:  # one copy for all places of a tied parameter
            yield from ((tied, rows) for tied in ties.get(source, ()))
