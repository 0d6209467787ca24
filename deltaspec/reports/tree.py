"""A model as a tree of lines: repeated layers folded, with widths, roles, parameter counts and the sites of a spec."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from deltaspec.backbone.table import ModuleTable, Row
from deltaspec.diagnostics.clean import clean
from deltaspec.diagnostics.findings import Diagnostic
from deltaspec.diagnostics.wording import plural
from deltaspec.language.model import DeltaSpec
from deltaspec.methods.registry import methods
from deltaspec.names.folding import ranges
from deltaspec.selection.select import Match, select

if TYPE_CHECKING:
    from rich.text import Text

_COLOURS = ("green", "magenta", "cyan", "yellow", "blue", "red")
_NARROWEST_TYPE = 12


@dataclass(frozen=True, slots=True)
class Mark:
    """One delta's claim on a module."""

    delta: str
    method: str
    colour: int
    """Number of the delta."""
    parameter: str | None = None
    """The parameter, where only that is meant."""

    def __str__(self) -> str:
        return f"{self.delta}: {self.method}{f' of {self.parameter}' if self.parameter else ''}"


@dataclass(frozen=True, slots=True)
class Line:
    """One line of the tree: a module, or several alike."""

    guide: str
    """Lines that draw the tree: `│  └─ `."""
    name: str
    """`query`, `layer.0-11 × 12`."""
    type: str
    shape: str
    """`768→3072`."""
    parameters: str
    roles: str
    marks: tuple[Mark, ...]
    note: str


@dataclass(frozen=True, slots=True)
class _Group:
    name: str
    rows: tuple[Row, ...]


@dataclass
class Tree:
    """Draws a table; `marks` are by module name."""

    table: ModuleTable
    marks: Mapping[str, Sequence[Mark]]
    depth: int | None = None
    everything: bool = False
    """Whether every module is drawn by itself, those without parameters too."""
    _children: dict[str, list[Row]] = field(default_factory=dict)
    _signatures: dict[str, object] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for row in self.table.rows:
            if row.fqn:
                self._children.setdefault(row.fqn.rpartition(".")[0], []).append(row)

    def lines(self) -> Iterator[Line]:
        """Return the lines from the root on."""
        root = self.table.rows[0]
        yield self._line("", _Group(self.table.model_class, (root,)), 0)
        yield from self._below(root, "", 1)

    def _below(self, row: Row, guide: str, depth: int) -> Iterator[Line]:
        if self.depth is not None and depth > self.depth:
            return
        groups = list(self._groups(row))
        for group in groups:
            last = group is groups[-1]
            yield self._line(f"{guide}{'└─ ' if last else '├─ '}", group, depth)
            yield from self._below(group.rows[0], f"{guide}{'   ' if last else '│  '}", depth + 1)

    def _groups(self, row: Row) -> Iterator[_Group]:
        """Return what stands directly below a module: like modules as one, lists of layers opened."""
        children = self._children.get(row.fqn, [])
        if self.everything:
            yield from (_Group(_last(child), (child,)) for child in children)
            return
        alike: dict[object, list[Row]] = {}
        for child in children:
            if child.subtree_parameters or child.buffers or self._sites(child):
                key = self._signature(child) if _last(child).isdigit() else child.fqn
                alike.setdefault(key, []).append(child)
        for rows in alike.values():
            first = rows[0]
            if len(rows) > 1:
                numbers = ranges(int(_last(r)) for r in rows).replace("..", "-")
                yield _Group(f"{numbers} × {len(rows)}", tuple(rows))
            elif "ModuleList" in first.bases and not self.marks.get(first.fqn) and self._children.get(first.fqn):
                yield from (_Group(f"{_last(first)}.{group.name}", group.rows) for group in self._groups(first))
            else:
                yield _Group(_last(first), (first,))

    def _signature(self, row: Row) -> object:
        """Return what must be equal for two modules to be drawn as one."""
        if row.fqn not in self._signatures:
            inside = [(_last(child), self._signature(child)) for child in self._children.get(row.fqn, ())]
            shapes = tuple((p.name, p.shape) for p in row.parameters)
            marks = tuple(self.marks.get(row.fqn, ()))
            whole = (row.type, row.in_features, row.out_features, shapes, row.roles, marks, tuple(inside))
            self._signatures[row.fqn] = whole
        return self._signatures[row.fqn]

    def _sites(self, row: Row) -> int:
        below = sum(self._sites(child) for child in self._children.get(row.fqn, ()))
        return below + len(self.marks.get(row.fqn, ()))

    def _line(self, guide: str, group: _Group, depth: int) -> Line:
        row, number = group.rows[0], len(group.rows)
        count = human(row.subtree_parameters) if row.subtree_parameters else ""
        marks = tuple(self.marks.get(row.fqn, ()))
        notes = []
        if row.aliases:
            notes.append(f"also {_shortened(row.aliases)}")
        if number == 1:
            ties = dict.fromkeys(other.rpartition(".")[0] for p in row.parameters for other in p.tied)
            notes += [f"tied to {_shortened(tuple(ties))}"] if ties else []
        if self.depth is not None and depth >= self.depth and (inside := number * (self._sites(row) - len(marks))):
            notes.append(f"{inside} {plural(inside, 'site')} inside")
        return Line(
            guide=guide,
            name=group.name,
            type=row.type if row.fqn else self.table.model_type or "",
            shape=_shape(row),
            parameters=f"{number} × {count}" if number > 1 and count else count,
            roles=", ".join(role for role in row.roles if role != "norm" or len(row.roles) == 1),
            marks=marks,
            note="; ".join(notes),
        )


def targets(spec: DeltaSpec, index: int, table: ModuleTable) -> tuple[tuple[Match, ...], list[Diagnostic]]:
    """Return what a delta's target (or its method's default roles) selects, and what is wrong with it."""
    entry = spec.deltas[index]
    if entry.sources:  # all of them have the same sites
        source = next(iter(entry.sources))
        return targets(spec, next(i for i, other in enumerate(spec.deltas) if other.name == source), table)
    if entry.target is not None:
        return select(entry.target, table, spec.selectors, spec)
    method = methods()[entry.method]
    return tuple(Match(row) for row in table.rows if row.fqn and method.is_default(row, entry.params)), []


def drawn(lines: Sequence[Line], width: int | None = None) -> Text:
    """Draw lines in aligned columns.

    Where `width` is too small, columns are cropped or left out: notes, types, then shapes; marks never.
    """
    from rich.text import Text

    columns = {
        "name": [
            Text.assemble((line.guide, "dim"), (clean(line.name), "bold" if line.marks else "")) for line in lines
        ],
        "type": [Text(clean(line.type), "blue") for line in lines],
        "shape": [Text(line.shape) for line in lines],
        "parameters": [Text(line.parameters) for line in lines],
        "roles": [Text(line.roles, "cyan") for line in lines],
        "marks": [_marked(line) for line in lines],
        "notes": [Text(f"({clean(line.note)})" if line.note else "", "dim") for line in lines],
    }
    widths = {name: max(cell.cell_len for cell in cells) for name, cells in columns.items()}
    widths = {name: size for name, size in widths.items() if size}
    excess = 0 if width is None else sum(widths.values()) + 2 * (len(widths) - 1) - width
    for name in ("notes", "crop", "type", "shape"):
        if excess > 0 and name == "crop" and widths.get("type", 0) - excess >= _NARROWEST_TYPE:
            widths["type"] -= excess
            excess = 0
        elif excess > 0 and name in widths:
            excess -= widths.pop(name) + 2
    text = Text()
    for number in range(len(lines)):
        row = Text()
        for name, size in widths.items():
            cell = columns[name][number].copy()
            cell.truncate(size, overflow="ellipsis")
            padding = " " * (size - cell.cell_len)
            row.append_text(Text(padding) + cell if name in ("shape", "parameters") else cell + Text(padding))
            row.append("  ")
        row.rstrip()
        text.append_text(row).append("\n")
    return text


def _marked(line: Line) -> Text:
    from rich.text import Text

    text = Text()
    for mark in line.marks:
        text.append(f"{', ' if text else ''}◀ {clean(str(mark))}", f"bold {_COLOURS[mark.colour % len(_COLOURS)]}")
    return text


def human(number: int) -> str:
    """Write a count in three digits: 768, 2.36K, 7.09M, 109M, 1.1B."""
    scaled, units = float(number), ["", "K", "M", "B", "T"]
    while scaled >= 999.5 and len(units) > 1:
        scaled /= 1000
        units.pop(0)
    if units[0] == "":
        return str(number)
    return f"{float(f'{scaled:.3g}'):g}{units[0]}"


def _shape(row: Row) -> str:
    if row.in_features is not None:
        return f"{row.in_features}→{row.out_features}"
    if row.kind == "norm" and row.has_parameter("weight"):
        return "×".join(str(size) for size in row.shape_of("weight"))
    return ""


def _shortened(names: Sequence[str]) -> str:
    return names[0] + (f" and {len(names) - 1} more" if len(names) > 1 else "")


def _last(row: Row) -> str:
    return row.fqn.rpartition(".")[2]
