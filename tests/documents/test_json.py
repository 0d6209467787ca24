"""JSON: what `json.dumps` writes is read as it was, and what is refused."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from random_documents import documents
from refusals import findings
from whole import examples

from deltaspec.documents.document import from_text


@given(documents, st.sampled_from([None, 1, "\t"]), st.booleans())
@examples(150)
def test_json_gives_what_json_dumps_wrote(data, indent, ascii_only):
    assert from_text(json.dumps(data, indent=indent, ensure_ascii=ascii_only), "t.json").data == data


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('{"a": 1,}', "1:8 DS106 malformed JSON: a comma before the end of a list or mapping"),
        ('{"a": [1, 2,]}', "1:12 DS106 malformed JSON: a comma before the end of a list or mapping"),
        ('{"a": 1 "b": 2}', "1:8 DS106 malformed JSON: a comma is missing here"),
        ("{'a': 1}", "1:2 DS106 malformed JSON: expected a key in double quotes, got '"),
        ('{"a": 01}', "1:7 DS106 malformed JSON: expected a value, got 01"),
        ('{"a": +1}', "1:7 DS106 malformed JSON: expected a value, got +1"),
        ('{"a": True}', "1:7 DS106 malformed JSON: expected a value, got True"),
        ('{"a": "x', "1:7 DS106 malformed JSON: a quote that is not closed in its line"),
        ('{"a": "\t"}', "1:8 DS106 malformed JSON: invalid control character"),
        ('{"a": 1} {}', "1:10 DS106 malformed JSON: more text after the end of the document"),
        ('{\n"a": 1', "2:7 DS106 malformed JSON: expected ',' or '}', got the end of the document"),
        ("// c\n{}", "1:1 DS106 malformed JSON: a comment"),
        ('{"a": 1, /* c */\n"b": 1}', "1:10 DS106 malformed JSON: a comment"),
        ('{"a": 1} # c', "1:10 DS106 malformed JSON: a comment"),
        ('{\n "a": [1]\n "b": 2}', "2:10 DS106 malformed JSON: a comma is missing here"),
        ('{"a": "x\n "b": 2}', "1:7 DS106 malformed JSON: a quote that is not closed in its line"),
        ('{\u00a0"a": 1}', "1:2 DS106 malformed JSON: U+00A0 NO-BREAK SPACE is no white space here"),
        ("{“a”: 1}", '1:2 DS106 malformed JSON: U+201C LEFT DOUBLE QUOTATION MARK is not "'),
        ('{"a": 1\n<<<<<<< HEAD\n, "b": 2\n=======\n}', "2:1 DS116 an unresolved merge conflict: <<<<<<< HEAD"),
        ('{"a": 1\n  =======\n}', "2:3 DS116 an unresolved merge conflict: ======="),
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
