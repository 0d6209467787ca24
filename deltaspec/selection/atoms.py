"""The leaf atoms of a selector as predicates on rows: what each one accepts, and what to say of a row it refuses."""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from json import dumps
from time import process_time

from deltaspec.backbone.table import ModuleTable, ParameterInfo, Row
from deltaspec.diagnostics.findings import Path
from deltaspec.language.selectors import Layers, Selector, Shape, given
from deltaspec.names.patterns import BacktrackingError, Pattern, compile_glob, compile_regex, fullmatch
from deltaspec.selection.clock import ticking

REGEX_SECONDS = 0.5
"""Processor time that one regular expression may take on a whole table."""

_COMPARISON = re.compile(r"(>=|<=|==|!=|>|<)?\s*(\d+)")
_OPERATORS: dict[str | None, Callable[[int, int], bool]] = {
    ">=": operator.ge,
    "<=": operator.le,
    "!=": operator.ne,
    ">": operator.gt,
    "<": operator.lt,
    "==": operator.eq,
    None: operator.eq,
}


@dataclass(frozen=True, slots=True)
class Atom:
    """One alternative of one key of a selector."""

    key: str
    value: str
    """Value as a document writes it: `"**.fc2"`, `{from: 3}`."""
    location: Path
    accepts: Callable[[Row], bool]
    shows: Callable[[Row], str]
    """Says what a row has where the atom asks: `layer 1`."""
    word: str = ""
    """Bare value, where it is a text."""
    numbers: tuple[int, ...] = ()
    """Layers that must be there (`from`, `to`, the listed ones, the last of `first` and `last`)."""

    @property
    def text(self) -> str:
        """Name the atom for a message."""
        return f"{self.key} {self.value}"


@dataclass(frozen=True, slots=True)
class ParameterAtom:
    """A glob on a parameter's full name; one without a dot also matches own names."""

    word: str
    location: Path
    pattern: Pattern

    @property
    def text(self) -> str:
        """Name the atom for a message."""
        return f"parameter {dumps(self.word, ensure_ascii=False)}"

    def accepts(self, row: Row, parameter: ParameterInfo) -> bool:
        """Return whether a row's own parameter is meant."""
        if "." not in self.word and fullmatch(self.pattern, parameter.name):
            return True
        names = (parameter.fqn, *(f"{alias}.{parameter.name}" for alias in row.aliases))
        return any(fullmatch(self.pattern, name) for name in names)


@dataclass
class Index:
    """A table, with what atoms and hints look up in it."""

    table: ModuleTable

    @cached_property
    def rows(self) -> tuple[Row, ...]:
        """All modules but the root, which is never a site."""
        return tuple(row for row in self.table.rows if row.fqn)

    @cached_property
    def stacks(self) -> dict[str, int]:
        """Number of layers of each stack."""
        sizes: dict[str, int] = {}
        for row in self.rows:
            if row.stack is not None and row.layer is not None:
                sizes[row.stack] = max(sizes.get(row.stack, 0), row.layer + 1)
        return sizes

    @cached_property
    def roles(self) -> frozenset[str]:
        """Roles that some module has."""
        return frozenset(role for row in self.rows for role in row.roles)

    @property
    def name(self) -> str:
        """Name of the model in messages."""
        return self.table.model_type or self.table.model_class


def atoms(selector: Selector, index: Index) -> Iterator[tuple[Atom, ...]]:
    """Return a selector's own leaf atoms on modules: the groups AND, the atoms in one group OR."""
    for key, make in (("path", _path), ("regex", _regex), ("type", _type), ("role", _role)):
        if words := getattr(selector, key):
            yield tuple(make(word, location) for word, location in _placed(selector, key, words))
    if selector.layers is not None:
        yield (_layers(selector.layers, (*selector.location, "layers"), index),)
    if selector.shape is not None:
        yield (_shape(selector.shape, (*selector.location, "shape")),)


def parameter_atoms(selector: Selector) -> tuple[ParameterAtom, ...]:
    """Return a selector's own leaf atoms on parameters, which OR."""
    placed = _placed(selector, "parameter", selector.parameter)
    return tuple(ParameterAtom(word, location, compile_glob(word)) for word, location in placed)


def _placed(selector: Selector, key: str, words: tuple[str, ...]) -> Iterator[tuple[str, Path]]:
    for place, word in enumerate(words):
        yield word, (*selector.location, key, *((place,) if len(words) > 1 else ()))


def _path(word: str, location: Path) -> Atom:
    return _named("path", word, location, compile_glob(word))


def _regex(word: str, location: Path) -> Atom:
    atom = _named("regex", word, location, compile_regex(word, probe=False))
    spent = 0.0

    def accepts(row: Row) -> bool:
        nonlocal spent
        if spent > REGEX_SECONDS:
            raise BacktrackingError(f"it takes more than {REGEX_SECONDS} s on the names of this model")
        start = process_time()
        with ticking():
            found = atom.accepts(row)
        spent += process_time() - start
        return found

    return Atom(atom.key, atom.value, location, accepts, atom.shows, word)


def _named(key: str, word: str, location: Path, pattern: Pattern) -> Atom:
    def accepts(row: Row) -> bool:
        if fullmatch(pattern, row.fqn):
            return True
        return bool(row.aliases) and any(fullmatch(pattern, alias) for alias in row.aliases)

    return Atom(key, dumps(word, ensure_ascii=False), location, accepts, lambda row: f"the name is {row.fqn}", word)


def _type(word: str, location: Path) -> Atom:
    return Atom("type", word, location, lambda row: word in row.bases, lambda r: f"it is a {' < '.join(r.bases)}", word)


def _role(word: str, location: Path) -> Atom:
    def shows(row: Row) -> str:
        return f"its roles are {', '.join(row.roles)}" if row.roles else "it has no role"

    return Atom("role", word, location, lambda row: word in row.roles, shows, word)


def _layers(layers: Layers, location: Path, index: Index) -> Atom:
    def accepts(row: Row) -> bool:
        at = row.layer
        if at is None or row.stack is None:
            return False
        return (
            (layers.from_ is None or at >= layers.from_)
            and (layers.to is None or at <= layers.to)
            and (layers.first is None or at < layers.first)
            and (layers.last is None or at >= index.stacks[row.stack] - layers.last)
            and (not layers.only or at in layers.only)
            and (layers.every is None or (at - (layers.from_ or 0)) % layers.every == 0)
        )

    def shows(row: Row) -> str:
        return "it lies in no layer" if row.layer is None else f"layer {row.layer} of {row.stack}"

    ends = (n - 1 for n in (layers.first, layers.last) if n is not None)
    named = (*(n for n in (layers.from_, layers.to) if n is not None), *layers.only, *ends)
    return Atom("layers", _written(layers, layers.only), location, accepts, shows, numbers=named)


def _shape(shape: Shape, location: Path) -> Atom:
    wanted_in, wanted_out = _comparison(shape.in_), _comparison(shape.out)

    def accepts(row: Row) -> bool:
        return wanted_in(row.in_features) and wanted_out(row.out_features)

    def shows(row: Row) -> str:
        if row.in_features is None and row.out_features is None:
            return f"a {row.type} has no widths"
        return f"in {row.in_features}, out {row.out_features}"

    return Atom("shape", _written(shape), location, accepts, shows)


def _comparison(wanted: int | str | None) -> Callable[[int | None], bool]:
    if wanted is None:
        return lambda width: True
    found = _COMPARISON.fullmatch(str(wanted).strip())
    if found is None:
        raise ValueError(f"{wanted!r} is no comparison such as >=4096")
    compare, number = _OPERATORS[found[1]], int(found[2])
    return lambda width: width is not None and compare(width, number)


def _written(part: Layers | Shape, only: tuple[int, ...] = ()) -> str:
    values = given(part)
    if only and len(values) == 1:
        return str(list(only))
    items = (f"{k}: {list(v) if isinstance(v, tuple) else dumps(v)}" for k, v in values.items())
    return f"{{{', '.join(items)}}}"
