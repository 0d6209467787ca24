"""The strict reader: what it takes, what it refuses, and that hostile documents cost little."""

import json
import subprocess
import sys
import time

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from deltaspec.diagnostics.findings import DeltaSpecError
from deltaspec.documents.document import from_data, from_text, read


def findings(text: str, name: str = "t.yaml") -> list[str]:
    with pytest.raises(DeltaSpecError) as caught:
        from_text(text, name)
    return [f"{d.line}:{d.column} {d.code} {d.message}" for d in caught.value.diagnostics]


def hint(text: str, name: str = "t.yaml") -> str | None:
    with pytest.raises(DeltaSpecError) as caught:
        from_text(text, name)
    return caught.value.diagnostics[0].suggestion


# --- values -----------------------------------------------------------------------------------------------------------

scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**63) + 1, 2**63 - 1),
    st.floats(allow_nan=False, allow_infinity=False, allow_subnormal=False),
    st.text(st.characters(exclude_categories=("Cs", "Cc", "Cn", "Zl", "Zp"), exclude_characters="\ufeff"), max_size=20),
)
keys = st.text(st.characters(min_codepoint=32, max_codepoint=0x2000, exclude_categories=("Cs", "Cc", "Cn")), max_size=8)
trees = st.recursive(
    scalars, lambda kids: st.lists(kids, max_size=4) | st.dictionaries(keys, kids, max_size=4), max_leaves=20
)
documents = st.dictionaries(keys, trees, max_size=4)


@given(documents, st.sampled_from([None, 1, "\t"]), st.booleans())
@settings(max_examples=150, deadline=None)
def test_json_gives_what_json_dumps_wrote(data, indent, ascii_only):
    assert from_text(json.dumps(data, indent=indent, ensure_ascii=ascii_only), "t.json").data == data


@given(documents)
@settings(max_examples=150, deadline=None)
def test_yaml_reads_json_documents_alike(data):
    text = json.dumps(data, ensure_ascii=False)
    assert from_text(text, "t.yaml").data == from_text(text, "t.json").data


@given(documents)
@settings(max_examples=150, deadline=None)
def test_yaml_gives_what_a_1_2_dumper_wrote(data):
    class Dumper(yaml.SafeDumper):
        """Strings in quotes, so that PyYAML's 1.1 rules have no say."""

        def ignore_aliases(self, _):
            return True

    Dumper.add_representer(str, lambda dumper, value: dumper.represent_scalar("tag:yaml.org,2002:str", value, '"'))
    assert from_text(yaml.dump(data, Dumper=Dumper, allow_unicode=True), "t.yaml").data == data


@given(documents)
@settings(max_examples=50, deadline=None)
def test_data_given_in_python_is_copied(data):
    document = from_data(data)
    assert document.data == data
    assert document.data is not data


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


def test_a_byte_order_mark_is_tolerated(tmp_path):
    for name, text in (("a.yaml", "a: 1"), ("a.json", '{"a": 1}')):
        (tmp_path / name).write_bytes(b"\xef\xbb\xbf" + text.encode())
        assert read(tmp_path / name).data == {"a": 1}


def test_windows_line_ends_and_surrogate_pairs():
    assert from_text("a: 1\r\nb: 2\r\n").data == {"a": 1, "b": 2}
    assert from_text('{"a": "\\ud83d\\ude00"}', "t.json").data == {"a": "😀"}


# --- places -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("t.yaml", 'a: 1\nb:\n  - x\n  - {k: "😀", v: 3}\n'),
        ("t.json", '{"a": 1,\n"b": [\n  "x",\n  {"k": "😀", "v": 3}]}'),
    ],
)
def test_places_of_keys_and_values(name, text):
    document = from_text(text, name)
    lines = text.splitlines()

    def at(path, key=False):
        line, column = document.position(path, key)
        return lines[line - 1][column - 1 :]

    assert at(("b", 0)).startswith(("x", '"x"'))
    assert at(("b", 1, "v")).startswith("3")
    assert at(("b", 1, "v"), key=True).startswith(("v: 3", '"v": 3'))
    assert at(("b", 1, "nowhere", 7)) == at(("b", 1)), "the nearest container stands in"
    assert document.position((), key=True) == (1, 1)


def test_data_given_in_python_has_no_places():
    finding = from_data({"a": {"b": [1]}}).diagnostic("DS203", "no", ("a", "b", 0))
    assert (finding.line, finding.column) == (0, 0)
    assert str(finding) == "<spec>:a.b[0]: error[DS203] no"


# --- refusals ---------------------------------------------------------------------------------------------------------


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


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('{"a": 1,}', "1:8 DS106 malformed JSON: a comma before the end of a list or mapping"),
        ('{"a": [1, 2,]}', "1:12 DS106 malformed JSON: a comma before the end of a list or mapping"),
        ('{"a": 1 "b": 2}', "1:9 DS106 malformed JSON: expected ',' or '}', got \""),
        ("{'a': 1}", "1:2 DS106 malformed JSON: expected a key in double quotes, got '"),
        ('{"a": 01}', "1:7 DS106 malformed JSON: expected a value, got 01"),
        ('{"a": +1}', "1:7 DS106 malformed JSON: expected a value, got +1"),
        ('{"a": True}', "1:7 DS106 malformed JSON: expected a value, got True"),
        ('{"a": "x', "1:7 DS106 malformed JSON: unterminated string"),
        ('{"a": "\t"}', "1:8 DS106 malformed JSON: invalid control character"),
        ('{"a": 1} {}', "1:10 DS106 malformed JSON: more text after the end of the document"),
        ('{\n"a": 1', "2:7 DS106 malformed JSON: expected ',' or '}', got the end of the document"),
        ("// c\n{}", "1:1 DS106 malformed JSON: expected a value, got /"),
        ('{"a": 1,\n "a": 2}', "2:2 DS107 duplicate key 'a': the first one stands at line 1, column 2"),
        ('{"a": NaN}', "1:7 DS111 NaN is not a finite number"),
        ('{"a": -Infinity}', "1:7 DS111 -Infinity is not a finite number"),
        ('{"a": 1e999}', "1:7 DS111 1e999 is too large for a double"),
        ('{"a": "\\ud800"}', "1:7 DS104 U+D800 is half of a surrogate pair"),
        ('{"a": "\\u0000"}', "1:7 DS104 a NUL character"),
        ("", "1:1 DS113 the document is empty"),
        ("[]", "1:1 DS114 a spec is a mapping, not a list"),
        ("{1: 2}", "1:2 DS106 malformed JSON: expected a key in double quotes, got 1"),
    ],
)
def test_refused_json(text, expected):
    assert findings(text, "t.json") == [expected]


def test_all_findings_of_the_reader_come_at_once():
    assert [f.split()[1] for f in findings("a: .nan\na: 1\nb: &x 1\n3: 4\n")] == ["DS111", "DS107", "DS108", "DS112"]


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        ({"a": float("nan")}, "<spec>:a: error[DS111] nan is not a finite number"),
        ({"a": [{1, 2}]}, "<spec>:a[0]: error[DS115] a document cannot hold a set"),
        ({"a": {3: 4}}, "<spec>:a: error[DS112] the key 3 is not a string"),
        ({"a": 10**30}, "<spec>:a: error[DS111] this integer does not fit into 64 bits"),
        ({"a": "\x00"}, "<spec>:a: error[DS104] a NUL character"),
        ([], "<spec>: error[DS114] a spec is a mapping, not a list"),
    ],
)
def test_refused_python_data(data, expected):
    with pytest.raises(DeltaSpecError) as caught:
        from_data(data)
    assert str(caught.value) == expected


def test_a_cycle_in_python_data_ends_in_one_finding():
    data: dict = {}
    data["a"] = [data, data]
    with pytest.raises(DeltaSpecError) as caught:
        from_data(data)
    assert [d.code for d in caught.value.diagnostics] == ["DS110"]


# --- files ------------------------------------------------------------------------------------------------------------


def test_files_that_cannot_be_read(tmp_path):
    latin, utf16, big = tmp_path / "l.yaml", tmp_path / "u.yaml", tmp_path / "b.yaml"
    latin.write_bytes("a: 1\nb: caf\xe9".encode("latin-1"))
    utf16.write_bytes("a: 1".encode("utf-16"))
    big.write_bytes(b"a: x" * (10 << 18))
    expected = {
        tmp_path: ("DS101", 0, 0, "this is a directory"),
        tmp_path / "none.yaml": ("DS101", 0, 0, "No such file"),
        latin: ("DS103", 2, 7, "byte 0xe9"),
        utf16: ("DS103", 1, 1, "byte 0xff"),
        big: ("DS102", 0, 0, "larger than 1 MiB"),
        "a\x00b": ("DS101", 0, 0, "null byte"),
        "deltaspec: 1\ndeltas: []": ("DS101", 0, 0, "No such file"),
    }
    for path, (code, line, column, text) in expected.items():
        with pytest.raises(DeltaSpecError) as caught:
            read(path)
        (finding,) = caught.value.diagnostics
        assert (finding.code, finding.line, finding.column) == (code, line, column)
        assert text in finding.message
        assert "\n" not in finding.file


def test_devices_and_pipes_are_not_waited_for():
    with pytest.raises(DeltaSpecError, match="not a regular file"):
        read("/dev/zero")


HOSTILE = {
    "deep [": "[" * 10_000,
    "deep {": "{a: " * 10_000,
    "deep -": "- " * 10_000,
    "deep ?": "? " * 10_000,
    "deep indentation": "".join(" " * i + "a:\n" for i in range(1400)),
    "number": "a: " + "9" * 1_000_000,
    "float": "a: -1." + "0" * 1_000_000,
    "exponent": "a: 1e" + "9" * 1_000_000,
    "many values": "a: [" + "1," * 500_000,
    "many duplicates": "a: 1\n" * 150_000,
    "quotes": '"' * 1_000_000,
    "stars": "*" * 1_000_000,
    "tags": "!" * 1_000_000,
    "spaces": "a: |\n" + " " * 1_000_000 + "\n]",
    "lines": "\n" * 1_000_000,
    "commas": "a: [" + "," * 1_000_000,
    "questions": "?" * 1_000_000,
    "anchors": "&a " * 300_000,
}


@pytest.mark.parametrize("name", ["t.yaml", "t.json"])
@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_documents_end_soon(kind, name):
    start = time.process_time()
    with pytest.raises(DeltaSpecError) as caught:
        from_text(HOSTILE[kind], name)
    assert time.process_time() - start < 3
    assert 1 <= len(caught.value.diagnostics) <= 100
    assert all(len(d.message) < 300 for d in caught.value.diagnostics)


def test_ten_megabytes_are_not_even_parsed(tmp_path):
    path = tmp_path / "big.deltaspec.yaml"
    path.write_bytes(b"[" * (10 << 20))
    done = subprocess.run(
        [sys.executable, "-m", "deltaspec", "validate", str(path)], capture_output=True, text=True, timeout=5
    )
    assert done.returncode == 1
    assert "error[DS102] larger than 1 MiB" in done.stdout


@given(st.text(max_size=60), st.sampled_from(["t.yaml", "t.json"]))
@settings(max_examples=400, deadline=None)
def test_any_text_gives_data_or_findings(text, name):
    try:
        assert isinstance(from_text(text, name).data, dict)
    except DeltaSpecError as error:
        assert error.diagnostics
        assert all(d.file == name and d.code.startswith("DS1") for d in error.diagnostics)


@given(
    st.lists(st.sampled_from([*"{}[]:,-?&*!|>'\"%@`# \n\tab01.~<", "- ", ": ", "? ", "---\n", "...\n"]), max_size=40)
)
@settings(max_examples=400, deadline=None)
def test_any_heap_of_yaml_signs_gives_data_or_findings(parts):
    try:
        from_text("".join(parts), "t.yaml")
    except DeltaSpecError as error:
        assert all(d.line >= 1 and d.column >= 1 for d in error.diagnostics)
