"""YAML: scalars of the 1.2 core schema, and what is refused, with a way out."""

import json

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from random_documents import documents
from refusals import findings, hint
from whole import examples

from deltaspec.diagnostics.findings import DeltaSpecError
from deltaspec.documents.document import from_text


@given(documents)
@examples(150)
def test_yaml_reads_json_documents_alike(data):
    text = json.dumps(data, ensure_ascii=False)
    assert from_text(text, "t.yaml").data == from_text(text, "t.json").data


@given(documents)
@examples(150)
def test_yaml_gives_what_a_1_2_dumper_wrote(data):
    class Dumper(yaml.SafeDumper):
        """Strings in quotes, so that PyYAML's 1.1 rules have no say."""

        def ignore_aliases(self, _):
            return True

    Dumper.add_representer(str, lambda dumper, value: dumper.represent_scalar("tag:yaml.org,2002:str", value, '"'))
    assert from_text(yaml.dump(data, Dumper=Dumper, allow_unicode=True), "t.yaml").data == data


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("8:16", "8:16"), ("off", "off"), ("yes", "yes"), ("on", "on"), ("010", 10), ("1e-4", 1e-4), ("1E3", 1000.0),
        ("0x1F", 31), ("0o17", 15), ("1_000", "1_000"), (".5", 0.5), ("1.", 1.0), ("+3", 3), ("-0", 0), ("~", None),
        ("null", None), ("Null", None), ("", None), ("true", True), ("TRUE", True), ("tRue", "tRue"), (".", "."),
        ("2024-01-01", "2024-01-01"),
        ("1.2.3", "1.2.3"), ("'8'", "8"), ('"true"', "true"), ("=", "="), ("0b1", "0b1"), ("1e", "1e"),
    ],
)  # fmt: skip
def test_plain_scalars_follow_yaml_1_2(text, value):
    found = from_text(f"a: {text}").data["a"]
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a: 1\na: 2", "2:1 DS107 duplicate key 'a': the first one stands at line 1, column 1"),
        ("a: {x: 1, 'x': 2}", "1:11 DS107 duplicate key 'x': the first one stands at line 1, column 5"),
        ("a: &b 1", "1:4 DS108 the anchor &b is not allowed"),
        ("a: *b", "1:4 DS108 the alias *b is not allowed"),
        (
            "a: !!python/object:os.system x",
            "1:4 DS108 the tag tag:yaml.org,2002:python/object:os.system is not allowed",
        ),
        ("<<: {a: 1}", "1:1 DS108 merge keys (<<) are not allowed"),
        ("%YAML 1.1\n---\na: 1", "1:1 DS108 directives (%YAML, %TAG) are not allowed"),
        ("a: 1\n---\nb: 1", "2:1 DS109 a second document starts here"),
        ("1: x", "1:1 DS112 the key 1 is not a string"),
        ("true: x", "1:1 DS112 the key true is not a string"),
        ("? [a]\n: b", "1:3 DS112 a key must be a string, not a mapping or list"),
        ("", "1:1 DS113 the document is empty"),
        ("# only a comment", "1:1 DS113 the document is empty"),
        ("null", "1:1 DS113 the document is empty"),
        ("- a", "1:1 DS114 a spec is a mapping, not a list"),
        ("just text", "1:1 DS114 a spec is a mapping, not a single value"),
        ("a: .nan", "1:4 DS111 .nan is not a finite number"),
        ("a: -.inf", "1:4 DS111 -.inf is not a finite number"),
        ("a: 1e400", "1:4 DS111 1e400 is too large for a double"),
        ("a: 1e-400", "1:4 DS111 1e-400 is too small for a double"),
        ("a: 9223372036854775808", "1:4 DS111 9223372036854775808 does not fit into 64 bits"),
        ("a: " + "9" * 5000, "1:4 DS111 a number of 5000 characters"),
        ("a: 0x" + "f" * 5000, "1:4 DS111 0x" + "f" * 38 + " does not fit into 64 bits"),
        ("a: 1\nb: x\x00y", "2:5 DS104 a NUL character"),
        ("a: x\x1by", "1:5 DS104 the character U+001B is not allowed"),
        ('a: "x\\x00"', "1:4 DS104 a NUL character"),
        ("a: x\u2028y", "1:5 DS104 the character U+2028 is not allowed"),
        ("path: **.q", "1:8 DS105 a plain value cannot start with *"),
        ("a:\n\tb: 1", "2:1 DS105 a tab cannot indent YAML"),
        ("a: @b", "1:4 DS105 a plain value cannot start with @"),
        ("a: `b`", "1:4 DS105 a plain value cannot start with `"),
    ],
)
def test_refused_yaml(text, expected):
    assert findings(text) == [expected]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("path: **.q", 'quote it: "**.q"'),
        ("deltas: [{path: **.q, a: 1}]", 'quote it: "**.q"'),
        ("path: *q", 'quote it, if it is a glob: "*q"; else write the value out where it is needed; '
         "`selectors:` and `ref:` share selectors"),
        ("a:\n\tb: 1", "indent with spaces"),
        ('a: "\\."', "in double quotes a backslash begins an escape: use single quotes ('\\.'), or double it"),
        ("a: b: c", "a value that holds ': ' must be quoted; keys of one mapping start in the same column"),
    ],
)  # fmt: skip
def test_refused_yaml_says_the_way_out(text, expected):
    assert hint(text) == expected


def test_all_findings_of_the_reader_come_at_once():
    assert [f.split()[1] for f in findings("a: .nan\na: 1\nb: &x 1\n3: 4\n")] == ["DS111", "DS107", "DS108", "DS112"]


@given(
    st.lists(
        st.sampled_from([*list("{}[]:,-?&*!|>'\"%@`# \n\tab01.~<"), "- ", ": ", "? ", "---\n", "...\n"]), max_size=40
    )
)
@examples(400)
def test_any_heap_of_yaml_signs_gives_data_or_findings(parts):
    try:
        from_text("".join(parts), "t.yaml")
    except DeltaSpecError as error:
        assert all(d.line >= 1 and d.column >= 1 for d in error.diagnostics)
