"""What is printed: nothing that acts on a terminal, hides, or does not show."""

import pytest

from deltaspec.diagnostics.clean import clean, clean_data
from deltaspec.diagnostics.findings import DeltaSpecError, Diagnostic


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("ü → 日本 🙂 a/b", "ü → 日本 🙂 a/b"),
        ("\x1b[31m\x07\x7f\x9b", r"\x1b[31m\x07\x7f\x9b"),
        ("a\nb\r\tc", r"a\nb\r\tc"),
        ("\u202ea\u2066b\u200e", r"\u202ea\u2066b\u200e"),
        ("\u200b\ufeff\u2060\u00ad\u3164", r"\u200b\ufeff\u2060\xad\u3164"),
        ("\u2028\u2029\x85\u00a0", r"\u2028\u2029\x85\xa0"),
        ("\ud800\udcff", r"\ud800\udcff"),
        ("\U000e0041", r"\U000e0041"),
    ],
)
def test_what_acts_or_hides_is_escaped(text, shown):
    assert clean(text) == shown == clean(shown)


def test_lines_may_be_kept_and_data_is_cleaned_whole():
    assert clean("a\nb\x1b", keep="\n") == "a\nb\\x1b"
    assert clean_data({"a\n": ["\x1b", 1, None, {"b": "\u202e"}]}) == {"a\\n": ["\\x1b", 1, None, {"b": "\\u202e"}]}


def test_findings_are_clean_wherever_they_come_from():
    found = Diagnostic("DS525", "key 'a\x1b[2J'", "d\n/x", suggestion="\u202e", where="a\u200b")
    assert (found.message, found.file, found.suggestion, found.where) == (
        r"key 'a\x1b[2J'", r"d\n/x", r"\u202e", r"a\u200b",
    )  # fmt: skip
    assert str(DeltaSpecError([found])).count("\n") == 1
    assert str(Diagnostic("DS101", "no", "::error::x.yaml")).startswith("./::error::x.yaml: ")
