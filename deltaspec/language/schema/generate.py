"""The JSON Schema of a spec, generated from the spec's models and from the methods' parameters.

It is draft-07, which editors know best, and means the same under 2020-12. Parameters hang on `if/then` per method:
with `oneOf`, a wrong parameter would be reported as a wrong method.
"""

from __future__ import annotations

import ast
import inspect
from collections.abc import Collection, Mapping
from functools import cache
from itertools import pairwise
from json import dumps
from textwrap import dedent
from typing import Any

from pydantic import BaseModel
from pydantic.json_schema import GenerateJsonSchema

from deltaspec.language.derivation import OTHERS, DerivedParams
from deltaspec.language.model import DeltaSpec
from deltaspec.language.schema.accept import CODED
from deltaspec.language.schema.coded import coded
from deltaspec.methods.base import Method
from deltaspec.methods.declarations import MethodParams
from deltaspec.methods.registry import builtin_methods, methods

_REF = "#/definitions/{model}"


def schema(methods: Mapping[str, Method], known: Collection[str] | None = None) -> dict[str, Any]:
    """Generate the schema for specs that may use these methods.

    Where `known` is given, these are the names that a document may use, and `methods` the ones that it does use.
    """
    root = _tidy(DeltaSpec.model_json_schema(by_alias=True, ref_template=_REF, schema_generator=_Described))
    definitions = root.pop("$defs")
    definitions["Selector"]["items"] = {"$ref": _REF.format(model="Selector")}
    conditions = []
    for name, method in methods.items():
        definitions.update(_params(name, method.Params, method.example))
        conditions.append(_condition(name, required=bool(definitions[f"{name}.params"].get("required"))))
    entry = definitions["DeltaEntry"]
    entry["properties"]["method"]["enum"] = list(methods if known is None else known)
    if known is None:
        summaries = "\n".join(f"- {name}: {method.summary}" for name, method in methods.items())
        entry["properties"]["method"]["description"] += f"\n{summaries}"
    definitions.update(_params("derived", DerivedParams, {}))
    entry["required"] = ["name"]
    entry["allOf"] = [*conditions, _derived(list(entry["properties"]))]
    return {
        "$schema": "http://json-schema.org/draft-07/schema#",
        "title": "DeltaSpec",
        **root,
        "definitions": dict(sorted(definitions.items())),
    }


def schema_text(with_plugins: bool = False) -> str:
    """Generate the schema as the text of a file: deltaspec's own methods, or all that are installed."""
    return dumps(schema(methods() if with_plugins else builtin_methods()), indent=2) + "\n"


class _Described(GenerateJsonSchema):
    """Takes descriptions from the docstrings below the fields.

    pydantic would (`use_attribute_docstrings`), but while each class is made, in every process: that reads its source.
    """

    def model_schema(self, schema: Any) -> dict[str, Any]:
        """Generate the schema of a model."""
        found = super().model_schema(schema)
        texts = _docstrings(schema["cls"])
        for name, field in schema["cls"].model_fields.items():
            described = found.get("properties", {}).get(field.alias or name)
            if described is not None and field.description is None and name in texts:
                described["description"] = texts[name]
        return found


def _docstrings(model: type) -> dict[str, str]:
    """Return the texts below the fields of a class and of its bases, by name; none where its source is not at hand."""
    found: dict[str, str | None] = {}
    for kind in reversed(model.__mro__[: model.__mro__.index(BaseModel)]):
        found |= _own_docstrings(kind)
    return {field: text for field, text in found.items() if text is not None}


@cache
def _own_docstrings(kind: type) -> dict[str, str | None]:
    """Return the text below each field of a class; None where none stands there. To parse the source takes a while."""
    try:
        [definition] = ast.parse(dedent(inspect.getsource(kind))).body
    except (OSError, TypeError, SyntaxError):
        return {}
    assert isinstance(definition, ast.ClassDef)
    found: dict[str, str | None] = {}
    for field, text in pairwise(definition.body):
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name):
            found[field.target.id] = None
            if isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant):
                found[field.target.id] = inspect.cleandoc(str(text.value.value))
    return found


def _params(name: str, params: type[MethodParams], example: Mapping[str, Any]) -> dict[str, Any]:
    """Generate the definitions of a method's parameters: whole, and for overrides, where none is required."""
    ref = f"#/definitions/{name}.{{model}}"
    whole = _tidy(params.model_json_schema(by_alias=True, ref_template=ref, schema_generator=_Described))
    if names := coded(params, example):
        whole = {"$comment": CODED + ", ".join(names), **whole}
    definitions = {f"{name}.{key}": value for key, value in whole.pop("$defs", {}).items()}
    for key, value in whole.get("properties", {}).items():
        value.setdefault("description", f"Parameter `{key}` of {name}.")
    definitions[f"{name}.params"] = whole
    if "required" in whole:
        definitions[f"{name}.override"] = {key: value for key, value in whole.items() if key != "required"}
    return definitions


def _condition(name: str, required: bool) -> dict[str, Any]:
    override = f"{name}.override" if required else f"{name}.params"
    then: dict[str, Any] = {
        "properties": {
            "params": {"$ref": _REF.format(model=f"{name}.params")},
            "overrides": {"items": {"properties": {"params": {"$ref": _REF.format(model=override)}}}},
        }
    }
    if required:
        then["required"] = ["params"]
    return {"if": {"properties": {"method": {"const": name}}, "required": ["method"]}, "then": then}


def _derived(keys: list[str]) -> dict[str, Any]:
    """Write what derived deltas, which have `from`, must say, and what the others must."""
    return {
        "if": {"required": ["from"]},
        "then": {
            "required": ["combine"],
            "propertyNames": {"enum": [key for key in keys if key not in OTHERS]},
            "properties": {"params": {"$ref": _REF.format(model="derived.params")}},
        },
        "else": {
            "required": ["method"],
            "propertyNames": {"enum": [key for key in keys if key in OTHERS or key not in ("from", "combine")]},
        },
    }


def _tidy(node: Any, names: bool = False) -> Any:
    """Drop what pydantic adds for itself, and write the rest so that draft-07 and 2020-12 read it alike.

    `names`: the keys of this mapping are property names, not keywords.
    """
    if isinstance(node, list):
        return [_tidy(item) for item in node]
    if not isinstance(node, dict):
        return node
    if names:
        return {key: _tidy(value) for key, value in node.items()}
    kept = {k: v for k, v in node.items() if k != "title" and not (k == "default" and v in (None, [], {}))}
    node = {k: _tidy(v, names=k in ("properties", "$defs", "patternProperties")) for k, v in kept.items()}
    if isinstance(node.get("description"), str):
        node["description"] = " ".join(node["description"].split())  # a docstring is wrapped for the source file
    if "anyOf" in node:
        node = _without_null(node)
    # draft-07 ignores what stands beside a $ref.
    if "$ref" in node and len(node) > 1:
        node = {"allOf": [{"$ref": node.pop("$ref")}], **node}
    return node


def _without_null(node: dict[str, Any]) -> dict[str, Any]:
    """Drop the null of an optional value: a document leaves the key out."""
    branches = [branch for branch in node["anyOf"] if branch != {"type": "null"}]
    rest = {key: value for key, value in node.items() if key != "anyOf"}
    return {**branches[0], **rest} if len(branches) == 1 else {**rest, "anyOf": branches}
