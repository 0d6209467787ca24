"""The generated schema: valid under both drafts, described, committed, and of one mind with the loader."""

import json
from pathlib import Path
from typing import Annotated

import jsonschema
import pytest
import yaml
from click.testing import CliRunner
from pydantic import Field
from repository import ROOT

from deltaspec.cli import main
from deltaspec.language.load import load
from deltaspec.language.migrate import CURRENT, migrate
from deltaspec.language.schema.accept import COMMITTED
from deltaspec.language.schema.generate import schema, schema_text
from deltaspec.language.validate import validate
from deltaspec.methods.base import Method
from deltaspec.methods.declarations import MethodParams
from deltaspec.methods.registry import builtin_methods


class PluginParams(MethodParams):
    """Parameters of the test's own method."""

    tokens: Annotated[int, Field(ge=1)]
    """Number of tokens."""
    places: tuple[int, ...] = ()
    """Some places."""
    undescribed: float | None = None


class Plugin(Method):
    """A method of another package."""

    name = "zz_plugin"
    summary = "a method of another package"
    paper = "none"
    Params = PluginParams
    default_roles = ("attn.q",)

    def tensors(self, site, params):
        return ()

    def apply(self, form, params, t, x, base):
        return base(x)


@pytest.fixture
def plugin(monkeypatch):
    found = {**builtin_methods(), "zz_plugin": Plugin()}
    monkeypatch.setattr("deltaspec.methods.registry.methods", lambda: found)
    monkeypatch.setattr("deltaspec.language.validate.methods", lambda: found)
    return found


def walk(node, path=()):
    yield path, node
    for key, child in node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ():
        yield from walk(child, (*path, key))


def test_the_committed_file_is_the_generated_one():
    assert (ROOT / COMMITTED).read_text(encoding="utf-8") == schema_text()


def test_it_is_valid_under_both_drafts(plugin):
    for methods in (builtin_methods(), plugin):
        generated = schema(methods)
        jsonschema.Draft7Validator.check_schema(generated)
        jsonschema.Draft202012Validator.check_schema(generated)
        assert generated["$schema"] == "http://json-schema.org/draft-07/schema#"


def test_both_drafts_judge_alike():
    generated = schema(builtin_methods())
    documents = [yaml.safe_load(p.read_text()) for p in sorted((ROOT / "specs").glob("*.yaml"))]
    documents += [
        {"deltaspec": 1, "deltas": [{"name": "d", "method": "lora", **extra}]}
        for extra in ({}, {"params": {"r": 1}}, {"target": 3}, {"target": []}, {"params": {"rank": 0}}, {"foo": 1})
    ]
    verdicts = [
        [validator(generated).is_valid(document) for document in documents]
        for validator in (jsonschema.Draft7Validator, jsonschema.Draft202012Validator)
    ]
    assert verdicts[0] == verdicts[1]
    assert verdicts[0][-6:] == [True, False, False, False, False, False]


def test_every_property_is_described_and_every_mapping_closed(plugin):
    generated = schema(plugin)
    for path, node in walk(generated):
        if not isinstance(node, dict) or "then" in path or "if" in path:
            continue
        if path[-1:] == ("properties",):
            assert all(value.get("description") for value in node.values()), path
        elif node.get("properties") and "if" not in node:
            assert node.get("additionalProperties") is False, path


def test_nothing_stands_beside_a_ref():
    for path, node in walk(schema(builtin_methods())):
        if isinstance(node, dict) and "$ref" in node and path[-1:] != ("properties",):
            assert list(node) == ["$ref"], path


def test_each_method_has_its_condition():
    generated = schema(builtin_methods())
    conditions = generated["definitions"]["DeltaEntry"]["allOf"]
    *of_methods, of_derived = conditions
    assert [c["if"]["properties"]["method"]["const"] for c in of_methods] == list(builtin_methods())
    assert of_derived["if"] == {"required": ["from"]} and of_derived["else"]["required"] == ["method"]
    assert "oneOf" not in schema_text()


def test_the_shipped_specs_are_valid_against_the_file_and_the_loader():
    committed = json.loads((ROOT / COMMITTED).read_text(encoding="utf-8"))
    paths = sorted((ROOT / "specs").glob("*.deltaspec.yaml"))
    assert len(paths) >= 5
    for path in paths:
        assert validate(path) == []
        jsonschema.validate(yaml.safe_load(path.read_text()), committed)
        assert path.read_text().startswith("# yaml-language-server: $schema=../schemas/deltaspec-v1.schema.json\n")


def test_a_plugins_params_are_checked(plugin):
    def spec(**delta):
        return {"deltaspec": 1, "deltas": [{"name": "d", "method": "zz_plugin", **delta}]}

    assert load(spec(params={"tokens": 3, "places": [1, 2]})).deltas[0].params.places == (1, 2)
    assert [d.message for d in validate(spec())] == ['deltas[0] lacks the key "params"']
    assert [d.message for d in validate(spec(params={}))] == ['params lacks the key "tokens"']
    assert [d.message for d in validate(spec(params={"tokens": 0}))] == ["tokens must be at least 1, not 0"]
    override = [{"match": "x", "params": {"places": [1]}}]
    assert validate(spec(params={"tokens": 1}, overrides=override)) == []
    assert schema(plugin)["definitions"]["zz_plugin.params"]["properties"]["undescribed"]["description"]


def test_a_plugin_that_cannot_be_loaded_is_a_finding(monkeypatch):
    def broken():
        raise ImportError("no such thing")

    monkeypatch.setattr("deltaspec.language.validate.methods", broken)
    found = validate({"deltaspec": 1, "deltas": [{"name": "d", "method": "theirs"}]})
    assert [d.code for d in found] == ["DS219", "DS206"]
    assert "ImportError: no such thing" in found[0].message


def test_migrating_the_current_version_changes_nothing():
    data = {"deltaspec": CURRENT, "deltas": []}
    assert migrate(data) == data


# --- deltaspec schema -------------------------------------------------------------------------------------------------


def test_the_verb_prints_writes_and_checks(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = CliRunner().invoke
    assert run(main, ["schema"]).output == schema_text()
    assert run(main, ["schema", "--check"]).exit_code == 1
    assert run(main, ["schema", COMMITTED]).exit_code == 0
    assert Path(COMMITTED).read_text(encoding="utf-8") == schema_text()
    assert run(main, ["schema", "--check"]).exit_code == 0
    Path(COMMITTED).write_text(schema_text().replace("Bounds of a count", "Bonds of a count"), encoding="utf-8")
    drifted = run(main, ["schema", "--check"])
    assert drifted.exit_code == 1
    assert '-      "description": "Bonds of a count' in drifted.output
    assert '+      "description": "Bounds of a count' in drifted.output
    assert "error[DS221] the schema file is out of date" in drifted.output


def test_the_verb_includes_plugins_only_when_asked(plugin):
    run = CliRunner().invoke
    assert "zz_plugin" in run(main, ["schema", "--with-plugins"]).output
    assert "zz_plugin" not in run(main, ["schema"]).output
