"""Selection: which modules (or parameters) of a table a selector means, and what is wrong with it.

A selector is a set: keys AND, lists OR, `any`, `all` and `not` nest. Every leaf atom and every `not` must match
something in the whole table, and what they leave together must not be empty, unless it carries `optional: true`,
which also excuses what is nested in it. The root is never matched. A module stands for all of its parameters; a
`parameter` atom picks single ones, and a module of which `not` excludes some parameters falls apart into the others.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

from deltaspec.backbone.table import ModuleTable, Row
from deltaspec.diagnostics.findings import DeltaSpecError, Diagnostic, Path, in_order
from deltaspec.diagnostics.wording import counted
from deltaspec.language.model import DeltaSpec
from deltaspec.language.selectors import Selector
from deltaspec.names.paths import below
from deltaspec.names.patterns import BacktrackingError
from deltaspec.selection import nearest
from deltaspec.selection.atoms import Atom, Index, ParameterAtom, atoms, parameter_atoms
from deltaspec.selection.clock import OverTimeError, timed

Item = tuple[int, str | None]
"""Number of a row and the own name of one of its parameters, or None for the module."""


@dataclass(frozen=True, slots=True)
class Match:
    """One selected module, or one of its parameters."""

    row: Row
    parameter: str | None = None

    @property
    def fqn(self) -> str:
        """Name of the module, or of the parameter."""
        return self.row.fqn if self.parameter is None else below(self.row.fqn, self.parameter)


def select(
    selector: Selector, table: ModuleTable, selectors: Mapping[str, Selector], spec: DeltaSpec
) -> tuple[tuple[Match, ...], list[Diagnostic]]:
    """Return what a selector matches, each module once and in the table's order, and all findings about it.

    Raises DeltaSpecError where the regular expressions of what is `timed` take too long together.
    """
    search = _Search(Index(table), selectors, spec, _names_parameters(selector, selectors))
    with timed():
        found = search.resolve(selector, False).items
    whole = {number for number, parameter in found if parameter is None}
    apart = (item for item in found if item[1] is None or item[0] not in whole)
    order = sorted(apart, key=lambda item: (item[0], item[1] or ""))
    matches = tuple(Match(table.rows[number], parameter) for number, parameter in order)
    return matches, list(dict.fromkeys(search.findings))


@dataclass(frozen=True, slots=True)
class _Part:
    """The set that one condition of a selector leaves."""

    text: str
    items: Collection[Item]
    excused: bool = False
    """Whether it may be empty."""


@dataclass
class _Search:
    index: Index
    selectors: Mapping[str, Selector]
    spec: DeltaSpec
    with_parameters: bool
    findings: list[Diagnostic] = field(default_factory=list)
    _known: dict[tuple[str, bool], tuple[_Part, list[Diagnostic]]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.members: list[tuple[Item, ...]] = []
        """Items of each row: itself, if it is not the root, and its parameters, if any atom asks for them."""
        for number, row in enumerate(self.index.table.rows):
            whole: tuple[Item, ...] = ((number, None),) if row.fqn else ()
            names = (p.name for p in row.parameters) if self.with_parameters else ()
            self.members.append((*whole, *((number, name) for name in names)))

    def resolve(self, selector: Selector, optional: bool) -> _Part:
        """Return the set that a selector means."""
        optional = optional or selector.optional
        before = len(self.findings)
        parts = [self._leaf(group, optional) for group in atoms(selector, self.index)]
        if picked := parameter_atoms(selector):
            parts.append(self._parameters(picked, optional))
        if selector.ref is not None:
            named = self._named(selector.ref, optional)
            parts.append(_Part(f"ref {selector.ref}", named.items, named.excused))
        if selector.any_of:
            options = [self.resolve(nested, optional) for nested in selector.any_of]
            union = set().union(*(option.items for option in options))
            parts.append(_Part(f"any of {len(options)}", union, any(option.excused for option in options)))
        for number, nested in enumerate(selector.all_of):
            inner = self.resolve(nested, optional)
            parts.append(_Part(f"all[{number}]", inner.items, inner.excused))
        if selector.none_of is not None:
            inner = self.resolve(selector.none_of, optional)
            parts.append(_Part(f"not ({inner.text})", self._complement(inner.items)))
        items = set(parts[0].items).intersection(*(part.items for part in parts[1:])) if parts else set()
        excused = not items and (optional or any(part.excused and not part.items for part in parts))
        if not items and not excused and len(self.findings) == before:
            self._empty(parts, selector.location)
        return _Part(" and ".join(part.text for part in parts), items, excused)

    def _named(self, name: str, optional: bool) -> _Part:
        """Return the set of a named selector, resolved once: those that refer to each other unfold to thousands."""
        if (name, optional) not in self._known:
            before = len(self.findings)
            part = self.resolve(self.selectors[name], optional)
            self._known[name, optional] = part, self.findings[before : before + 1]
        part, wrong = self._known[name, optional]
        self.findings += wrong  # again: whoever refers to it must know that it has been said why there is nothing
        return part

    def _leaf(self, group: tuple[Atom, ...], optional: bool) -> _Part:
        found: set[Item] = set()
        for atom in group:
            try:
                hits = [number for number, row in enumerate(self.index.table.rows) if row.fqn and atom.accepts(row)]
            except BacktrackingError as error:
                self._find("DS307", f"{atom.text}: {error}", error.suggestion, atom.location)
                if isinstance(error, OverTimeError):  # what follows would only say so again
                    raise DeltaSpecError(in_order(self.findings)) from None
                continue
            for number in hits:
                found.update(self.members[number])
            if not optional and (missing := nearest.missing(atom, self.index, bool(hits))):
                self._find(*missing, atom.location)
        return _Part(" or ".join(atom.text for atom in group), found, optional)

    def _parameters(self, group: tuple[ParameterAtom, ...], optional: bool) -> _Part:
        found: set[Item] = set()
        for atom in group:
            rows = enumerate(self.index.table.rows)
            hits = {(number, p.name) for number, row in rows for p in row.parameters if atom.accepts(row, p)}
            found |= hits
            if not hits and not optional:
                message = f"no parameter matches {atom.text}"
                self._find("DS308", message, nearest.parameter_hint(atom, self.index), atom.location)
        return _Part(" or ".join(atom.text for atom in group), found, optional)

    def _complement(self, items: Collection[Item]) -> set[Item]:
        # A module of which single parameters are excluded is not there as a whole any more, its other parameters are.
        touched = {number for number, _ in items}
        left = (item for members in self.members for item in members if item not in items)
        return {item for item in left if item[1] is not None or item[0] not in touched}

    def _empty(self, parts: list[_Part], location: Path) -> None:
        counts = ", ".join(f"{part.text} ({self._modules(part.items)})" for part in parts)
        hint = None
        for place, part in reversed(list(enumerate(parts))):
            rest = [other.items for other in parts[:place] + parts[place + 1 :]]
            left = set(rest[0]).intersection(*rest[1:]) if rest else ()
            if left:
                hint = f"without {part.text} it would match {self._modules(left)}"
                break
        message = f"nothing matches all of: {counts}" if len(parts) > 1 else f"nothing matches {counts}"
        self._find("DS305", message, hint, location)

    def _modules(self, items: Collection[Item]) -> str:
        return counted(len({number for number, _ in items}), "module")

    def _find(self, code: str, message: str, suggestion: str | None, location: Path) -> None:
        self.findings.append(self.spec.diagnostic(code, message, location, suggestion))


def _names_parameters(selector: Selector, selectors: Mapping[str, Selector]) -> bool:
    seen: set[str] = set()
    waiting = [selector]
    while waiting:
        for nested in waiting.pop().walk():
            if nested.parameter:
                return True
            if nested.ref is not None and nested.ref not in seen:
                seen.add(nested.ref)
                waiting.append(selectors[nested.ref])
    return False
