"""Reasons why a selector takes or refuses one module, atom by atom."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from deltaspec.backbone.table import ModuleTable, Row
from deltaspec.diagnostics.findings import Path
from deltaspec.language.selectors import Selector
from deltaspec.names.patterns import BacktrackingError
from deltaspec.selection.atoms import Index, atoms, parameter_atoms


@dataclass(frozen=True, slots=True)
class Reason:
    """The verdict of one condition on one module. Those of depth 0 must all accept."""

    text: str
    """The condition, as a document writes it."""
    location: Path
    """Path of the condition in the document."""
    accepted: bool
    why: str
    """The module's own state of what the condition asks: `layer 1 of encoder.layer`."""
    depth: int = 0
    """Depth of its nesting in `any`, `all`, `not` and `ref`; the conditions inside come right after it."""

    def __str__(self) -> str:
        verdict = "accepted" if self.accepted else "refused"
        return f"{'  ' * self.depth}{self.text}: {verdict}{f', {self.why}' if self.why else ''}"


def explain(selector: Selector, table: ModuleTable, row: Row, selectors: Mapping[str, Selector]) -> list[Reason]:
    r"""Return the verdict of every condition of a selector on one module, nested ones after what holds them.

    >>> print(*explain(selector, table, row, {}), sep="\n")
    role attn.q: accepted, its roles are attn.q
    layers {from: 3}: refused, layer 1 of encoder.layer
    """
    return _explain(selector, Index(table), row, selectors)


def _explain(selector: Selector, index: Index, row: Row, selectors: Mapping[str, Selector]) -> list[Reason]:
    if not row.fqn:
        return [Reason("target", selector.location, False, "the model itself is never a site")]
    reasons: list[Reason] = []
    for group in atoms(selector, index):
        first = group[0]
        words = first.value if len(group) == 1 else f"[{', '.join(atom.value for atom in group)}]"
        location = first.location if len(group) == 1 else first.location[:-1]
        try:
            accepted = any(atom.accepts(row) for atom in group)
            why = first.shows(row)
        except BacktrackingError as error:
            accepted, why = False, str(error)
        reasons.append(Reason(f"{first.key} {words}", location, accepted, why))
    if picked := parameter_atoms(selector):
        names = [p.name for p in row.parameters if any(atom.accepts(row, p) for atom in picked)]
        own = ", ".join(p.name for p in row.parameters)
        why = f"its parameter {', '.join(names)}" if names else f"its own parameters are {own or 'none'}"
        text = " or ".join(atom.text for atom in picked)
        reasons.append(Reason(text, (*selector.location, "parameter"), bool(names), why))
    if selector.ref is not None:
        inner = _explain(selectors[selector.ref], index, row, selectors)
        reasons += _nested(f"ref {selector.ref}", (*selector.location, "ref"), _all(inner), "", inner)
    for key, several, least in (("any", selector.any_of, 1), ("all", selector.all_of, len(selector.all_of))):
        if several:
            options = [_explain(nested, index, row, selectors) for nested in several]
            held = sum(map(_all, options))
            why, inner = f"{held} of {len(options)} hold", [r for o in options for r in o]
            reasons += _nested(key, (*selector.location, key), held >= least, why, inner)
    if selector.none_of is not None:
        inner = _explain(selector.none_of, index, row, selectors)
        why = "all of it holds" if _all(inner) else "it does not hold"
        reasons += _nested("not", (*selector.location, "not"), not _all(inner), why, inner)
    return reasons


def _all(reasons: list[Reason]) -> bool:
    return all(reason.accepted for reason in reasons if reason.depth == 0)


def _nested(text: str, location: Path, accepted: bool, why: str, inner: list[Reason]) -> list[Reason]:
    return [Reason(text, location, accepted, why), *(replace(r, depth=r.depth + 1) for r in inner)]
