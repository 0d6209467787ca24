"""Data given in Python, and the bounds of all readers: hostile documents cost little."""

import time

import pytest
from hypothesis import given
from random_documents import documents
from whole import examples

from deltaspec.diagnostics.findings import DeltaSpecError
from deltaspec.documents.document import from_data, from_text


@given(documents)
@examples(50)
def test_data_given_in_python_is_copied(data):
    document = from_data(data)
    assert document.data == data
    assert document.data is not data


def test_data_given_in_python_has_no_places():
    finding = from_data({"a": {"b": [1]}}).diagnostic("DS203", "no", ("a", "b", 0))
    assert (finding.line, finding.column) == (0, 0)
    assert str(finding) == "<spec>:a.b[0]: error[DS203] no"


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
