"""The quick yes to valid documents: never where jsonschema or pydantic would object, and without importing either."""

import copy
import json
import subprocess
import sys

import jsonschema
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from pydantic import field_validator, model_validator
from repository import ROOT
from whole import examples

from deltaspec.documents.document import from_data
from deltaspec.language.checks.gate import gate, validator
from deltaspec.language.checks.whole import check
from deltaspec.language.load import load
from deltaspec.language.matrix import written_out
from deltaspec.language.params import read_params
from deltaspec.language.schema import accept
from deltaspec.language.schema.accept import accepts, is_coded, is_valid, shipped
from deltaspec.language.schema.coded import coded
from deltaspec.language.validate import validate
from deltaspec.methods.declarations import MethodParams
from deltaspec.methods.registry import builtin_methods

SPECS = [yaml.safe_load(path.read_text()) for path in sorted((ROOT / "specs").glob("*.deltaspec.yaml"))]
EXAMPLES = [
    json.loads(json.dumps({"deltaspec": 1, "deltas": [{"name": "d", "method": name, "params": dict(method.example)}]}))
    for name, method in builtin_methods().items()
]
VALUES = st.sampled_from(
    [
        *(None, True, 0, 1, -1, 8, 8.0, 0.5, 1e9, "", "x", "lora", "8:16", ">=4", "50%", "a\n", [], ["x"], [1, 2], {}),
        *({"budget": "0.5%"}, {"budget": 9}, {"from": 1}, {"path": "**.q"}, {"in": ">=4"}, {"min": 1, "max": 0}),
        *({"rank": [4, 2]}, {"rank": [0], "train.lr": [1]}, {"lr": 1}, "french"),
    ]
)
KEYS = [
    "rank",
    "alpha",
    "parts",
    "width",
    "reduction",
    "init",
    "text",
    "tied",
    "target",
    "from",
    "combine",
    "train",
    "matrix",
    "lr_ratio",
    "not",
    "any",
]


def places(node, path=()):
    yield path
    for key, child in node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ():
        yield from places(child, (*path, key))


@st.composite
def documents(draw):
    """A valid document with up to three values replaced, added or taken away."""
    data = copy.deepcopy(draw(st.sampled_from([*SPECS, *EXAMPLES])))
    for _ in range(draw(st.integers(0, 3))):
        found = [place for place in places(data) if place and place != ("deltaspec",)]
        if not found:
            break
        *path, last = draw(st.sampled_from(found))
        parent = data
        for key in path:
            parent = parent[key]
        action = draw(st.sampled_from(["replace", "delete", "add"]))
        if action == "replace":
            parent[last] = copy.deepcopy(draw(VALUES))
        elif action == "delete":
            del parent[last]
        elif isinstance(parent, dict):
            parent[draw(st.sampled_from(KEYS))] = copy.deepcopy(draw(VALUES))
    return data


def everything(data):
    """Return the findings without the quick yes."""
    document, wrong = written_out(from_data(data), builtin_methods())
    refused = gate(document, builtin_methods())
    return [*wrong, *refused, *check(document, builtin_methods(), refused, lambda _: True)]


@examples(300)
@given(documents())
def test_what_is_accepted_has_no_finding_that_jsonschema_or_pydantic_would_make(data):
    known = builtin_methods()
    expected = not list(validator(tuple(known), tuple(known.items())).iter_errors(data))
    assert accepts(data) == expected
    assert set(map(str, validate(data))) == set(map(str, everything(data)))
    if not everything(data):
        load(data)


@pytest.mark.parametrize("data", [*SPECS, *EXAMPLES], ids=lambda data: data["deltas"][0]["name"])
def test_every_shipped_spec_and_example_is_accepted(data):
    assert accepts(data) and everything(data) == []


def test_a_valid_document_needs_neither_pydantic_nor_jsonschema_nor_torch():
    program = (
        "import sys, deltaspec; assert deltaspec.validate(sys.argv[1]) == []; "
        "print([name for name in ('torch', 'pydantic', 'jsonschema') if name in sys.modules])"
    )
    for name in ("french", "adalora", "lora-bert"):
        path = ROOT / "specs" / f"{name}.deltaspec.yaml"
        found = subprocess.run([sys.executable, "-c", program, path], capture_output=True, text=True, cwd=ROOT)
        assert found.stdout == "[]\n", found.stderr


def test_keywords_mean_what_they_mean_to_jsonschema():
    values = [None, True, False, 0, 1, 5, 2.5, -3, "", "ab", "ab\n", "abc", [], [1], ["a", 1], {}, {"a": 1}, {"b": "x"}]
    schemas = [
        {"type": "number"},
        {"type": ["string", "null"]},
        {"const": 1},
        {"const": True},
        {"enum": [0, "ab", None]},
        {"pattern": "^[a-z]{2}"},
        {"minimum": 1, "exclusiveMaximum": 5},
        {"exclusiveMinimum": 0, "maximum": 2.5},
        {"minLength": 1, "maxLength": 2},
        {"minItems": 1, "maxItems": 1, "items": {"type": "integer"}},
        {"minProperties": 1, "properties": {"a": {"type": "string"}}},
        {"properties": {"a": True}, "additionalProperties": False},
        {"additionalProperties": {"type": "string"}},
        {"propertyNames": {"enum": ["a"]}},
        {"required": ["a"]},
        {"allOf": [{"type": "string"}, {"minLength": 1}]},
        {"anyOf": [{"type": "string"}, {"$ref": "#/definitions/n"}]},
        {"if": {"type": "string"}, "then": {"minLength": 2}, "else": {"type": "number"}},
        {"if": {"required": ["a"]}, "else": False},
    ]
    for schema in schemas:
        whole = {**schema, "definitions": {"n": {"type": "integer"}}}
        for value in values:
            wanted = jsonschema.Draft7Validator(whole).is_valid(value)
            assert is_valid(value, whole, whole["definitions"]) == wanted, (schema, value)


def test_an_unknown_keyword_is_no_yes(monkeypatch):
    with pytest.raises(NotImplementedError, match="dependencies"):
        is_valid({}, {"dependencies": {}}, {})
    monkeypatch.setattr(accept, "shipped", lambda: {**shipped.__wrapped__(), "dependencies": {}})
    assert not accepts(SPECS[0]) and validate(SPECS[0]) == []
    monkeypatch.setattr(accept, "shipped", lambda: None)
    assert not accepts(SPECS[0]) and validate(SPECS[0]) == []


def test_rules_in_code_are_found_with_the_fields_that_they_read():
    class Rules(MethodParams):
        a: int = 1
        b: int | None = None
        c: int = 0
        d: tuple[int, ...] = ()
        e: int = 3

        @property
        def both(self):
            return self.a and self.b

        def late(self):
            return self.c

        @model_validator(mode="after")
        def _rule(self):
            if self.both and self.late():
                raise ValueError("not both")
            return self

        @field_validator("d")
        @classmethod
        def _distinct(cls, value):
            return value

    class Before(MethodParams):
        a: int = 1

        @model_validator(mode="before")
        @classmethod
        def _rule(cls, data):
            return data

    class Needs(MethodParams):
        a: int
        b: int = 0

        @model_validator(mode="after")
        def _rule(self):
            return self

    assert coded(Rules, {}) == ["a", "b", "d"]  # c is read only where b is given
    assert coded(Before, {}) == ["a"]
    assert coded(Needs, {}) == ["a", "b"] and coded(Needs, {"a": 1}) == []
    names = {name: coded(method.Params, method.example) for name, method in builtin_methods().items()}
    assert names["lora"] == ["parts"] and names["full"] == [] and names["trainable_tokens"] == ["token_ids"]


def test_coded_parameters_are_read_by_the_method():
    assert not is_coded({"method": "lora", "params": {"rank": 4}})
    assert is_coded({"method": "lora", "params": {"parts": ["q"]}})
    assert is_coded({"method": "lora", "overrides": [{"match": "x", "params": {"parts": ["q"]}}]})
    assert is_coded({"method": "lora", "overrides": [{"match": "x", "params": {"rank": {"budget": 9}}}]})
    both = {"name": "d", "method": "lora", "params": {"parts": ["q"], "bias": True}}
    assert [d.code for d in validate({"deltaspec": 1, "deltas": [both]})] == ["DS210"]
    with pytest.raises(ValueError):
        read_params(builtin_methods()["lora"].Params, both["params"])


def test_the_schema_names_them():
    committed = json.loads((ROOT / accept.COMMITTED).read_text(encoding="utf-8"))
    assert committed["definitions"]["lora.params"]["$comment"] == "Rules in code read parts"
    assert "$comment" not in committed["definitions"]["full.params"]
