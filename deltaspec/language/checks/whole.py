"""Checks that look at several places of a document; they skip what the schema refuses, so all findings come at once."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from itertools import islice
from time import process_time
from typing import TYPE_CHECKING, Any

from deltaspec.diagnostics.findings import Diagnostic, Path
from deltaspec.diagnostics.wording import closest, show_value
from deltaspec.documents.builder import MAX_FINDINGS
from deltaspec.documents.document import Document
from deltaspec.language.checks.mistakes import no_space_hint
from deltaspec.language.params import read_params
from deltaspec.names.patterns import BacktrackingError, PatternError, compile_glob, compile_regex

if TYPE_CHECKING:
    from deltaspec.methods.base import Method

MAX_EXPANSION = 10_000
"""Selectors that one named selector may come to once every `ref` is written out."""
MAX_CHAIN = 16
"""Named selectors that may refer to each other in turn."""
MAX_REGEXES = 200
_PROBE_BUDGET = 0.5
_POSITIVE = ("path", "regex", "type", "role", "layers", "shape", "parameter", "ref", "any", "all")
_PATTERN_ATOMS = ("path", "regex", "parameter")


def check(
    document: Document, methods: Mapping[str, Method], refused: list[Diagnostic], coded: Callable[[Any], bool]
) -> list[Diagnostic]:
    """Return the findings about a document, beside those of the schema, which are `refused`.

    `coded` tells whether a delta's parameters have to be read by the method's own class.
    """
    data = document.data
    selectors = list(_selectors(document))
    named = _mapping(data.get("selectors"))
    parts = (
        _names(document),
        _atoms(document, selectors, named),
        _references(document, named),
        _ranges(document, selectors),
        _parameters(document, methods, {d.where for d in refused}, coded),
        _derived(document, methods),
        _hints(document, methods),
    )
    return [finding for part in parts for finding in islice(part, MAX_FINDINGS)]


def _mapping(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _items(value: Any) -> Iterator[tuple[int, dict[str, Any]]]:
    """Return the mappings of a list, with their indices."""
    for index, item in enumerate(value if isinstance(value, list) else ()):
        if isinstance(item, dict):
            yield index, item


def _selectors(document: Document) -> Iterator[tuple[Path, Any]]:
    """Return every selector of a document, nested ones included; those of a matrix, which its deltas share, once."""
    data, seen = document.data, set[Path]()
    for name, selector in _mapping(data.get("selectors")).items():
        yield from _nested(selector, ("selectors", name))
    for index, delta in _items(data.get("deltas")):
        if (entry := document.written(("deltas", index))) in seen:
            continue
        seen.add(entry)
        if "target" in delta:
            yield from _nested(delta["target"], ("deltas", index, "target"))
        for number, override in _items(delta.get("overrides")):
            if "match" in override:
                yield from _nested(override["match"], ("deltas", index, "overrides", number, "match"))
    untouched = _mapping(data.get("expect")).get("untouched")
    for index, selector in enumerate(untouched if isinstance(untouched, list) else ()):
        yield from _nested(selector, ("expect", "untouched", index))


def _nested(selector: Any, path: Path) -> Iterator[tuple[Path, Any]]:
    pending = [(path, selector)]
    while pending:
        path, selector = pending.pop()
        yield path, selector
        if isinstance(selector, list):
            pending += [((*path, index), item) for index, item in enumerate(selector)]
        for key in ("any", "all"):
            nested = _mapping(selector).get(key)
            pending += [((*path, key, i), item) for i, item in enumerate(nested if isinstance(nested, list) else ())]
        if "not" in _mapping(selector):
            pending.append(((*path, "not"), selector["not"]))


def _names(document: Document) -> Iterator[Diagnostic]:
    """Delta names: each once. They name files, so case alone does not tell two apart."""
    first: dict[str, tuple[str, Path]] = {}
    for index, delta in _items(document.data.get("deltas")):
        name, path = delta.get("name"), ("deltas", index, "name")
        if not isinstance(name, str):
            continue
        if name.lower() not in first:
            first[name.lower()] = (name, path)
            continue
        other, place = first[name.lower()]
        line, column = document.position(place)
        where = f"line {line}, column {column}" if line else document.where(place[:2])
        what = f"duplicate delta name {show_value(name)}"
        if name != other:
            what = f"the delta names {show_value(name)} and {show_value(other)} differ in case only"
        yield document.diagnostic("DS211", f"{what}: the first one stands at {where}", path, "rename one of the two")


def _atoms(document: Document, selectors: list[tuple[Path, Any]], named: Mapping[str, Any]) -> Iterator[Diagnostic]:
    """Check each selector by itself: a positive atom, patterns that compile, a `ref` that exists."""
    spent, regexes = 0.0, 0
    for path, selector in selectors:
        if isinstance(selector, str):
            yield from _pattern(document, path, selector, compile_glob)
        if not isinstance(selector, dict) or not selector:
            continue
        if ("not" in selector or "optional" in selector) and not any(key in selector for key in _POSITIVE):
            hint = 'say what to choose from, such as path: "**"'
            message = "a selector needs an atom that chooses, not only one that excludes"
            yield document.diagnostic("DS214", message, path, hint)
        for key in _PATTERN_ATOMS:
            texts = selector.get(key)
            for index, text in enumerate(texts if isinstance(texts, list) else [texts]):
                place = (*path, key, index) if isinstance(texts, list) else (*path, key)
                if not isinstance(text, str):
                    continue
                if key != "regex":
                    yield from _pattern(document, place, text, compile_glob, key)
                    continue
                regexes += 1
                if regexes > MAX_REGEXES:
                    message = f"more than {MAX_REGEXES} regular expressions"
                    yield document.diagnostic("DS204", message, place, "use path: or role: instead")
                    return
                start, probe = process_time(), spent < _PROBE_BUDGET
                yield from _pattern(document, place, text, partial(compile_regex, probe=probe))
                spent += process_time() - start
        ref = selector.get("ref")
        if isinstance(ref, str) and ref and ref not in named:
            near = closest(ref, named)
            hint = f'did you mean "{near}"?' if near else "name it under selectors"
            if named and not near:
                hint = f"selectors are: {', '.join(list(named)[:8])}{', …' if len(named) > 8 else ''}"
            yield document.diagnostic("DS212", f"no selector is named {show_value(ref)}", (*path, "ref"), hint)


def _pattern(
    document: Document, path: Path, text: str, compiler: Callable[[str], object], key: str = "path"
) -> Iterator[Diagnostic]:
    if not text or len(text) > 500:
        return  # the schema says so
    atom = text.partition(":")[0]
    if compiler is compile_glob and atom in (*_POSITIVE, "not", "optional") and (hint := no_space_hint(text)):
        yield document.diagnostic("DS216", f"{key} {show_value(text)}: it is no name of a module", path, hint)
        return
    try:
        compiler(text)
    except PatternError as error:
        glob = compiler is compile_glob
        code = "DS216" if glob else "DS218" if isinstance(error, BacktrackingError) else "DS217"
        what, hint = key if glob else "regular expression", error.suggestion
        if key == "parameter" and hint is not None:  # `regex` matches names of modules only
            hint = hint.replace("a path", "a name or path").removesuffix("; use regex: for more")
        yield document.diagnostic(code, f"{what} {show_value(text)}: {error}", path, hint)


def _references(document: Document, named: Mapping[str, Any]) -> Iterator[Diagnostic]:
    """Named selectors that refer to themselves, or that unfold to far too much."""
    references: dict[str, list[tuple[Path, str]]] = {}
    own_size: dict[str, int] = {}
    for name, selector in named.items():
        nested = list(_nested(selector, ("selectors", name)))
        own_size[name] = len(nested)
        pairs = [(path, _mapping(s).get("ref")) for path, s in nested]
        references[name] = [((*p, "ref"), ref) for p, ref in pairs if isinstance(ref, str) and ref in named]
    size: dict[str, int] = {}
    depth: dict[str, int] = {}
    unfolding: list[str] = []
    circular = False
    for start in references:
        trail = {start: iter(references[start])} if start not in size else {}
        while trail:
            name = next(reversed(trail))
            path, ref = next(trail[name], (None, ""))
            if path is None:
                del trail[name]
                refs = [r for _, r in references[name] if r in size]
                size[name] = own_size[name] + sum(size[r] for r in refs)
                depth[name] = 1 + max((depth[r] for r in refs), default=0)
                if size[name] > MAX_EXPANSION or depth[name] > MAX_CHAIN:
                    unfolding.append(name)
                    size[name] = depth[name] = 0
            elif ref in trail:
                circular = True
                circle = [*list(trail)[list(trail).index(ref) :], ref]
                shown = circle if len(circle) <= 8 else [*circle[:4], "…", *circle[-3:]]
                message = f"circular reference: {' → '.join(shown)}"
                yield document.diagnostic("DS213", message, path, "break the circle")
            elif ref not in size:
                trail[ref] = iter(references[ref])
    for name in () if circular else unfolding:
        message = f"the selector {name!r} refers to too many others in turn"
        yield document.diagnostic("DS213", message, ("selectors", name), "write it out", key=True)


def _ranges(document: Document, selectors: list[tuple[Path, Any]]) -> Iterator[Diagnostic]:
    """Ranges whose end lies before their beginning."""
    places: list[tuple[Path, Any, str, str]]
    places = [((*path, "layers"), _mapping(s).get("layers"), "from", "to") for path, s in selectors]
    expects: list[tuple[Path, Any]] = [(("expect",), document.data.get("expect"))]
    expects += [(("deltas", i, "expect"), d.get("expect")) for i, d in _items(document.data.get("deltas"))]
    for path, expect in expects:
        places += [((*path, key), _mapping(expect).get(key), "min", "max") for key in ("sites", "trainable")]
    for path, bounds, low, high in places:
        start, end = _mapping(bounds).get(low), _mapping(bounds).get(high)
        if isinstance(start, int) and isinstance(end, int) and start > end:
            message = f"{low} {start} is greater than {high} {end}"
            yield document.diagnostic("DS215", message, (*path, low), f"swap {low} and {high}?")


def _parameters(
    document: Document, methods: Mapping[str, Method], refused: set[str], coded: Callable[[Any], bool]
) -> Iterator[Diagnostic]:
    """Parameters as the method's own class reads them, overrides merged in, where the schema had no objection."""
    for index, delta in _items(document.data.get("deltas")):
        if not coded(delta):
            continue
        method = methods.get(delta["method"]) if isinstance(delta.get("method"), str) else None
        params, path = delta.get("params", {}), ("deltas", index, "params")
        if "from" in delta or method is None or not isinstance(params, dict):
            continue
        if any(_touches(refused, document.where(place)) for place in (path, *((*path, key) for key in params))):
            continue
        whole = list(_read(method, params, document, path))
        yield from whole
        for number, override in _items(delta.get("overrides")):
            changed = override.get("params")
            where = ("deltas", index, "overrides", number, "params")
            if whole or not isinstance(changed, dict) or _touches(refused, document.where(where)):
                continue
            yield from _read(method, params | changed, document, where)
            for key in (key for key, value in changed.items() if "budget" in _mapping(value)):
                message, hint = "a budget is the whole delta's", "write a number here, the budget in params"
                yield document.diagnostic("DS210", f"{key}: {message}", (*where, key), hint)


def _derived(document: Document, methods: Mapping[str, Method]) -> Iterator[Diagnostic]:
    """Check derived deltas; most documents have none, and then nothing about them is imported."""
    if any("from" in delta for _, delta in _items(document.data.get("deltas"))):
        from deltaspec.language.derivation import check

        yield from check(document, methods)


def _hints(document: Document, methods: Mapping[str, Method]) -> Iterator[Diagnostic]:
    """Check hints for training; most documents have none, and then nothing about them is imported."""
    if any("train" in delta for _, delta in _items(document.data.get("deltas"))):
        from deltaspec.language.training import check

        yield from check(document, methods)


def _touches(refused: set[str], place: str) -> bool:
    return any(where == place or where.startswith((f"{place}.", f"{place}[")) for where in refused)


def _read(method: Method, params: dict[str, Any], document: Document, path: Path) -> Iterator[Diagnostic]:
    from pydantic import ValidationError

    try:
        read_params(method.Params, params)
    except ValidationError as error:
        for found in error.errors(include_url=False):
            if found["type"] == "missing":
                continue  # the schema says so
            raised = found.get("ctx", {}).get("error")
            text = str(raised) if isinstance(raised, Exception) else found["msg"]
            names = [part for part in found["loc"] if isinstance(part, str) and part in method.Params.model_fields]
            where = f"{names[0]}: " if names else ""
            place = (*path, names[0]) if names else path
            yield document.diagnostic("DS210", f"{where}{text[:1].lower()}{text[1:]}", place)
