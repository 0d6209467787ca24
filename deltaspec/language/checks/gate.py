"""Hold a document against the JSON Schema, and say in the author's words what is wrong."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import lru_cache
from itertools import islice
from typing import Any

from deltaspec.diagnostics.findings import Diagnostic, Path
from deltaspec.diagnostics.wording import show_path, show_value
from deltaspec.documents.builder import MAX_FINDINGS
from deltaspec.documents.document import Document
from deltaspec.language.checks.mistakes import choice_hint, method_hint, unknown_key_hint, value_hint
from deltaspec.language.conditions import AMOUNT
from deltaspec.language.derivation import OTHERS
from deltaspec.language.schema.accept import matches
from deltaspec.language.schema.generate import schema
from deltaspec.language.selectors import NAME
from deltaspec.methods.base import Method
from deltaspec.names.escaping import DELTA_NAME

_TYPES = {
    "string": "text", "integer": "an integer", "number": "a number", "boolean": "true or false", "array": "a list",
    "object": "a mapping", "null": "nothing",
}  # fmt: skip
_Finding = tuple[str, str, str | None]
"""Code, message, suggestion."""


def gate(document: Document, methods: Mapping[str, Method]) -> list[Diagnostic]:
    """Return the findings of the schema about a document that may use these methods."""
    deltas = document.data.get("deltas")
    named = {d["method"] for d in deltas if _names_a_method(d, methods)} if isinstance(deltas, list) else set()
    holds = validator(tuple(methods), tuple((name, methods[name]) for name in sorted(named)))
    errors = list(islice(_each_once(holds.iter_errors(document.data), document), MAX_FINDINGS + 1))
    mistyped = {tuple(error.absolute_path) for error in errors if error.validator == "type"}
    return [
        finding
        for error in errors
        if error.validator == "type" or tuple(error.absolute_path) not in mistyped
        for finding in _diagnose(error, document, methods)
    ]


def _each_once(errors: Iterator[Any], document: Document) -> Iterator[Any]:
    """Yield errors of the schema, those about one place in deltas of one matrix once."""
    seen = set()
    for error in errors:
        told = document.where(tuple(error.absolute_path)), error.message
        if not document.places or told not in seen:
            yield error
        seen.add(told)


def _names_a_method(delta: Any, methods: Mapping[str, Method]) -> bool:
    return isinstance(delta, dict) and isinstance(delta.get("method"), str) and delta["method"] in methods


def _method_at(path: Path, document: Document, methods: Mapping[str, Method]) -> Method | None:
    """Return the method of the delta that a path leads into; None where there is none."""
    delta = document.data["deltas"][path[1]] if path[:1] == ("deltas",) and len(path) > 1 else {}
    return methods[delta["method"]] if _names_a_method(delta, methods) else None


@lru_cache(maxsize=8)
def validator(known: tuple[str, ...], used: tuple[tuple[str, Method], ...]) -> Any:
    """Return what holds documents against the schema: they may use the `known` methods, and do use these."""
    from jsonschema import Draft7Validator
    from jsonschema.validators import extend

    # JSON Schema takes 8.0 for an integer; the methods do not.
    strict = Draft7Validator.TYPE_CHECKER.redefine(
        "integer", lambda _, v: isinstance(v, int) and not isinstance(v, bool)
    )
    kind: Any = extend(Draft7Validator, {"pattern": _whole_pattern}, type_checker=strict)  # type: ignore[no-untyped-call]
    return kind(schema(dict(used), known))


def _whole_pattern(_: Any, pattern: str, instance: Any, __: Any) -> Iterator[Any]:
    from jsonschema import ValidationError

    if isinstance(instance, str) and not matches(pattern, instance):
        yield ValidationError("")


def _diagnose(error: Any, document: Document, methods: Mapping[str, Method]) -> Iterator[Diagnostic]:
    """Turn one error of jsonschema into findings."""
    path: Path = tuple(error.absolute_path)
    written = document.written(path)
    said = written if written[2:] == path[2:] else path  # entries behind a matrix have other numbers than their deltas
    if error.validator == "additionalProperties":
        known = tuple(error.schema.get("properties", ()))
        method = _method_at(path, document, methods)
        for key in error.instance:
            if key not in known:
                message = f"unknown key {show_value(key)}"
                offered = tuple(name for name in known if not name.startswith("$"))
                hint = unknown_key_hint(key, path, offered, error.instance, method)
                yield document.diagnostic("DS201", message, (*path, key), hint, key=True)
        return
    if error.validator == "required":
        for key in error.validator_value:
            if key not in error.instance:
                where = f"{_label(said)} lacks" if path else "the spec lacks"
                yield document.diagnostic("DS202", f"{where} the key {show_value(key)}", path, _MISSING.get(key))
        return
    if "propertyNames" in error.absolute_schema_path and error.validator == "enum":
        if error.instance in ("combine", *OTHERS):  # others are unknown keys, and reported as such
            derived = error.instance in OTHERS
            message = f'{show_value(error.instance)} has no place {"beside" if derived else "without"} "from"'
            hint = "a derived delta has its sources' sites; delete one of the two" if derived else _MISSING["from"]
            hint = "a derived delta is not trained: delete it" if error.instance == "train" else hint
            yield document.diagnostic("DS201", message, (*path, error.instance), hint, key=True)
        return
    if "propertyNames" in error.absolute_schema_path:
        yield document.diagnostic(
            "DS208", f"{show_value(error.instance)} is not a name", (*path, error.instance), _NAME_HINT, key=True
        )
        return
    code, text, way_out = _TRANSLATIONS.get(error.validator, _other)(error, said)
    yield document.diagnostic(code, text, path, way_out)


def _type(error: Any, path: Path) -> _Finding:
    kinds = [error.validator_value] if isinstance(error.validator_value, str) else list(error.validator_value)
    expected = _expected(kinds)
    properties = error.schema.get("properties", {})
    if "any" in properties:
        expected = "a selector: a path, a list or a mapping"
    elif "budget" in properties:
        expected = "an integer or a mapping with budget"
    hint = value_hint(error.instance, kinds, path)
    if "enum" in error.schema:
        hint = f"known values: {', '.join(str(v) for v in error.schema['enum'])}"
    if error.instance is None:
        return "DS203", f"{_label(path)} must be {expected}, but has no value", hint
    got = f"{'the text ' if isinstance(error.instance, str) else ''}{show_value(error.instance)}"
    return "DS203", f"{_label(path)} must be {expected}, not {got}", hint


def _enum(error: Any, path: Path) -> _Finding:
    known = [value for value in error.validator_value if isinstance(value, str)]
    if not isinstance(error.instance, str):
        values = ", ".join(show_value(value) for value in error.validator_value)
        return "DS205", f"{_label(path)} cannot be {show_value(error.instance)}", f"known values: {values}"
    if path[-1] == "method" and path[:1] == ("deltas",) and len(path) == 3:
        return "DS206", f"unknown method {show_value(error.instance)}", method_hint(error.instance, known)
    key = next(part for part in reversed(path) if isinstance(part, str))
    return "DS205", f"{key} knows no value {show_value(error.instance)}", choice_hint(key, error.instance, known)


def _bound(error: Any, path: Path) -> _Finding:
    limit = error.validator_value
    shown = int(limit) if isinstance(limit, float) and limit.is_integer() else limit
    must = f"{_label(path)} must be {_BOUNDS[error.validator]} {shown}"
    return "DS204", f"{must}, not {show_value(error.instance)}", None


def _length(error: Any, path: Path) -> _Finding:
    if error.validator == "minLength":
        return "DS208", f"{_label(path)} is empty", "delete the key, or give it a value"
    limit = error.validator_value
    return "DS208", f"{_label(path)} has {len(error.instance)} characters; at most {limit} are allowed", None


def _empty(error: Any, path: Path) -> _Finding:
    if error.instance:
        noun = "items" if isinstance(error.instance, list) else "keys"
        return "DS204", f"{_label(path)} must have at least {error.validator_value} {noun}", None
    kind = "list" if isinstance(error.instance, list) else "mapping"
    hint = _EMPTY.get(str(path[-1]), "delete it, or put something into it")
    return "DS209", f"{_label(path)} is an empty {kind}", hint


def _pattern(error: Any, path: Path) -> _Finding:
    if error.validator_value == DELTA_NAME:
        return "DS208", f"{show_value(error.instance)} is not a name", _DELTA_NAME_HINT
    if error.validator_value == NAME:
        return "DS208", f"{show_value(error.instance)} is not a name", _NAME_HINT
    if error.validator_value == AMOUNT:
        hint = 'write a number and its unit: "<= 12GiB", 800MB, "≤ 1.5 TiB"'
        return "DS208", f"{show_value(error.instance)} is not an amount of memory", hint
    if path[-1] == "budget":
        hint = 'write a number of parameters (300000), or a share of the backbone\'s ("0.5%")'
        return "DS208", f"{show_value(error.instance)} is not a budget", hint
    if "shape" in path:
        hint = 'write a width (4096), or one of >= <= > < == != and a width (">=4096")'
        return "DS208", f"{show_value(error.instance)} is not a comparison", hint
    hint = f"it must match {error.validator_value}"
    return "DS208", f"{_label(path)} is malformed: {show_value(error.instance)}", hint


def _any_of(error: Any, path: Path) -> _Finding:
    kinds: list[str] = []
    for branch in error.validator_value:
        kind = branch.get("type", "object")
        kinds += [kind] if isinstance(kind, str) else kind
    context = error.context or ()
    others = {deep.schema_path[0] for deep in context if deep.validator == "type" and not deep.relative_path}
    own = {id(d): d for d in context if d.validator != "type" and d.schema_path[0] not in others}
    if len(own) == 1 or (own and isinstance(error.instance, int)):  # the first branch of the right type says more
        deep = next(iter(own.values()))
        return _TRANSLATIONS.get(deep.validator, _other)(deep, (*path, *deep.relative_path))
    expected = _expected(list(dict.fromkeys(kinds)))
    got = "but has no value" if error.instance is None else f"not {show_value(error.instance)}"
    return "DS203", f"{_label(path)} must be {expected}, {got}", value_hint(error.instance, kinds, path)


def _other(error: Any, path: Path) -> _Finding:
    if isinstance(error.validator_value, str | int | float):
        return "DS210", f"{_label(path)} does not keep to {error.validator}: {error.validator_value}", None
    return "DS210", f"{_label(path)} cannot be {show_value(error.instance)} (its {error.validator})", None


def _expected(kinds: list[str]) -> str:
    words = [_TYPES[kind] for kind in kinds]
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} or {words[-1]}"


def _label(path: Path) -> str:
    """Name a value by its own key, and the indices after it."""
    for position in range(len(path) - 1, -1, -1):
        if isinstance(path[position], str):
            return show_path(path[position:])
    return "the spec"


_NAME_HINT = "names are letters, digits, - and _, at most 64, and begin with a letter"
_DELTA_NAME_HINT = "names are letters, digits, - and _, with . and / between them: french, user/lora, 1_task"
_MISSING = {
    "deltaspec": "begin with: deltaspec: 1",
    "deltas": "list at least one delta: deltas: [{name: …, method: lora}]",
    "name": "name the delta: it is attached, saved and reported by its name",
    "method": "say which delta-tuning method, such as method: lora",
    "combine": "say how the sources are combined, such as combine: linear",
    "from": "name the sources: from: {french: 0.7, legal: 0.3}",
    "match": "say for which sites, such as match: {role: attn.v}",
    "params": "say what differs, such as params: {rank: 4}",
    "max": "say how much, such as max: 12GiB",
}
_EMPTY = {
    **{key: _MISSING[key] for key in ("deltas", "from")},
    "target": "leave target out for the method's default roles, or say where",
}
_BOUNDS = {
    "minimum": "at least", "maximum": "at most", "exclusiveMinimum": "greater than", "exclusiveMaximum": "less than",
    "multipleOf": "a multiple of",
}  # fmt: skip
_TRANSLATIONS: dict[str, Callable[[Any, Path], _Finding]] = {
    "type": _type,
    "enum": _enum,
    "const": lambda error, path: (
        "DS205",
        f"{_label(path)} must be {show_value(error.validator_value)}, not {show_value(error.instance)}",
        None,
    ),
    **dict.fromkeys(_BOUNDS, _bound),
    **dict.fromkeys(("minLength", "maxLength"), _length),
    **dict.fromkeys(("minItems", "minProperties"), _empty),
    "pattern": _pattern,
    "anyOf": _any_of,
    "oneOf": _any_of,
}
