"""A quick yes to valid documents, from the shipped JSON Schema: a spec that is right needs no jsonschema, nor pydantic
to generate the schema, whose imports cost more than everything else that validating does.

Only `gate` says what is wrong: it generates the schema of the installed methods and holds it against the document.
"""

from __future__ import annotations

import operator
import os
import re
from collections.abc import Callable, Mapping, Sized
from functools import cache
from json import loads
from typing import Any

from deltaspec.language.migrate import CURRENT

COMMITTED = f"schemas/deltaspec-v{CURRENT}.schema.json"
"""Path of the schema file: in the repository, or in the installed package."""

CODED = "Rules in code read "
"""Beginning of a schema's comment that names the parameters which more than the schema checks."""


def accepts(data: Any) -> bool:
    """Return whether the shipped schema, which knows deltaspec's own methods, holds a document for valid.

    False also where that file is missing or says something that this module does not know.
    """
    schema = shipped()
    try:
        return schema is not None and is_valid(data, schema, schema["definitions"])
    except NotImplementedError:
        return False


def is_coded(delta: Mapping[str, Any]) -> bool:
    """Return whether code also checks the parameters of an accepted delta: the schema names those (`$comment`)."""
    schema = shipped()
    assert schema is not None
    if "from" in delta:
        return False  # a derived one's have no such rules
    text = schema["definitions"][f"{delta['method']}.params"].get("$comment", "")
    overrides = [override["params"] for override in delta.get("overrides", ())]
    if any(isinstance(value, dict) for params in overrides for value in params.values()):
        return True  # a budget, which an override cannot have
    names = text.removeprefix(CODED).split(", ")
    return any(key in names for params in (delta.get("params", {}), *overrides) for key in params)


@cache
def shipped() -> dict[str, Any] | None:
    """Return the schema file of the repository or of the installed package; None where there is none."""
    package = os.path.dirname(os.path.dirname(os.path.dirname(__file__)))
    for folder in (package, os.path.dirname(package)):
        try:
            with open(os.path.join(folder, COMMITTED), encoding="utf-8") as file:
                found: dict[str, Any] = loads(file.read())
        except FileNotFoundError:
            continue
        return found
    return None


def is_valid(value: Any, schema: Any, definitions: Mapping[str, Any]) -> bool:
    """Return whether a value keeps to a schema, as draft-07 has it, but 8.0 is no integer.

    Raises NotImplementedError for a keyword that is not known here.
    """
    if isinstance(schema, bool):
        return schema
    for keyword, wanted in schema.items():
        rule = _RULES.get(keyword)
        if rule is None:
            if keyword not in _ANNOTATIONS:
                raise NotImplementedError(keyword)
        elif not rule(value, wanted, schema, definitions):
            return False
    return True


Definitions = Mapping[str, Any]
_ANNOTATIONS = frozenset(("$schema", "title", "description", "$comment", "default", "definitions", "then", "else"))


def _is(value: Any, kind: str) -> bool:
    return isinstance(value, _TYPES[kind]) and (kind == "boolean" or not isinstance(value, bool))


_TYPES: Mapping[str, Any] = {
    "string": str, "integer": int, "number": (int, float), "boolean": bool, "array": list, "object": dict,
    "null": type(None),
}  # fmt: skip


def _same(value: Any, other: Any) -> bool:
    if isinstance(other, dict | list):
        raise NotImplementedError("a constant that is a list or a mapping")
    return bool(value == other) and isinstance(value, bool) == isinstance(other, bool)


def _type(value: Any, wanted: Any, _: Any, __: Definitions) -> bool:
    return _is(value, wanted) if isinstance(wanted, str) else any(_is(value, kind) for kind in wanted)


def _ref(value: Any, wanted: str, _: Any, definitions: Definitions) -> bool:
    return is_valid(value, definitions[wanted.removeprefix("#/definitions/")], definitions)


def _properties(value: Any, wanted: Any, _: Any, definitions: Definitions) -> bool:
    given = value if isinstance(value, dict) else {}
    return all(is_valid(given[key], schema, definitions) for key, schema in wanted.items() if key in given)


def _additional(value: Any, wanted: Any, schema: Any, definitions: Definitions) -> bool:
    known, given = schema.get("properties", ()), value if isinstance(value, dict) else {}
    return all(is_valid(item, wanted, definitions) for key, item in given.items() if key not in known)


def _names(value: Any, wanted: Any, _: Any, definitions: Definitions) -> bool:
    return not isinstance(value, dict) or all(is_valid(key, wanted, definitions) for key in value)


def _items(value: Any, wanted: Any, _: Any, definitions: Definitions) -> bool:
    if isinstance(wanted, list):
        raise NotImplementedError("items by position")
    return not isinstance(value, list) or all(is_valid(item, wanted, definitions) for item in value)


def _if(value: Any, wanted: Any, schema: Any, definitions: Definitions) -> bool:
    branch = schema.get("then" if is_valid(value, wanted, definitions) else "else", True)
    return is_valid(value, branch, definitions)


def matches(pattern: str, text: str) -> bool:
    """Search for a pattern as ECMAScript reads it: there, `$` does not match before a last line feed."""
    return re.search(pattern.removesuffix("$") + r"\Z" if pattern.endswith("$") else pattern, text) is not None


def _multiple(value: Any, wanted: Any, _: Any, __: Definitions) -> bool:
    if not isinstance(wanted, int) or isinstance(value, float):
        raise NotImplementedError("multiples of fractions")
    return not _is(value, "integer") or value % wanted == 0


def _limit(compare: Callable[[Any, Any], bool]) -> Callable[..., bool]:
    return lambda value, wanted, _, __: not _is(value, "number") or compare(value, wanted)


def _length(kind: type[Sized], compare: Callable[[int, int], bool]) -> Callable[..., bool]:
    return lambda value, wanted, _, __: not isinstance(value, kind) or compare(len(value), wanted)


_RULES: Mapping[str, Callable[[Any, Any, Any, Definitions], bool]] = {
    "type": _type,
    "const": lambda value, wanted, _, __: _same(value, wanted),
    "enum": lambda value, wanted, _, __: any(_same(value, one) for one in wanted),
    "$ref": _ref,
    "allOf": lambda value, wanted, _, definitions: all(is_valid(value, one, definitions) for one in wanted),
    "anyOf": lambda value, wanted, _, definitions: any(is_valid(value, one, definitions) for one in wanted),
    "if": _if,
    "properties": _properties,
    "additionalProperties": _additional,
    "propertyNames": _names,
    "required": lambda value, wanted, _, __: not isinstance(value, dict) or all(key in value for key in wanted),
    "items": _items,
    "pattern": lambda value, wanted, _, __: not isinstance(value, str) or matches(wanted, value),
    "multipleOf": _multiple,
    "minimum": _limit(operator.ge),
    "maximum": _limit(operator.le),
    "exclusiveMinimum": _limit(operator.gt),
    "exclusiveMaximum": _limit(operator.lt),
    "minLength": _length(str, operator.ge),
    "maxLength": _length(str, operator.le),
    "minItems": _length(list, operator.ge),
    "maxItems": _length(list, operator.le),
    "minProperties": _length(dict, operator.ge),
    "maxProperties": _length(dict, operator.le),
}
