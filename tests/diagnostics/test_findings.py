"""Findings: their text, their order, and what errors carry."""

import pickle
import re
from pathlib import Path

import pytest

import deltaspec
from deltaspec.diagnostics.codes import CODES
from deltaspec.diagnostics.findings import DeltaSpecError, Diagnostic, in_order
from deltaspec.diagnostics.wording import closest, show_path, show_value


def test_the_text_of_a_finding():
    finding = Diagnostic("DS302", 'no module matches path "**.fc9"', "specs/f.yaml", 7, 13, 'did you mean "**.fc2"?')
    assert str(finding) == (
        'specs/f.yaml:7:13: error[DS302] no module matches path "**.fc9"\n  = help: did you mean "**.fc2"?'
    )
    assert str(Diagnostic("DS101", "cannot read", "f.yaml")) == "f.yaml: error[DS101] cannot read"
    assert str(Diagnostic("DS203", "no", where="deltas[0].name")) == "<spec>:deltas[0].name: error[DS203] no"


def test_an_error_carries_and_prints_all_findings():
    findings = (Diagnostic("DS101", "one", "a"), Diagnostic("DS102", "two", "b", 1, 2, "so"))
    error = DeltaSpecError(iter(findings))
    assert error.diagnostics == findings
    assert str(error) == "a: error[DS101] one\nb:1:2: error[DS102] two\n  = help: so"
    assert isinstance(error, ValueError)
    assert pickle.loads(pickle.dumps(error)).diagnostics == findings


@pytest.mark.parametrize(
    ("word", "known", "found"),
    [
        ("rnk", ["rank", "alpha"], "rank"),
        ("LORA", ["lora", "full"], "lora"),
        ("zzz", ["rank", "alpha"], None),
        ("", ["rank"], None),
        ("x", [], None),
    ],
)
def test_closest(word, known, found):
    assert closest(word, known) == found


def test_values_and_paths_as_messages_show_them():
    assert show_path(("deltas", 0, "target", "any", 1)) == "deltas[0].target.any[1]"
    assert show_path(()) == ""
    assert [show_value(v) for v in ("a", True, None, 3, 0.5, [], {})] == [
        '"a"', "true", "nothing (null)", "3", "0.5", "a list", "a mapping",
    ]  # fmt: skip
    assert len(show_value("x" * 500)) <= 60


def test_findings_are_sorted_by_place_once_each():
    a, b, c = (Diagnostic("DS201", "m", "f", line, 1) for line in (1, 2, 3))
    assert in_order([c, a, b, a]) == [a, b, c]


def test_every_code_that_the_package_uses_is_listed_with_a_title():
    used = set()
    for path in Path(deltaspec.__file__).parent.rglob("*.py"):
        if path.name != "diagnostics.py":
            used |= set(re.findall(r"\"(DS\d{3})\"", path.read_text(encoding="utf-8")))
    assert used - CODES.keys() == set()
    assert list(CODES) == sorted(CODES)
    assert all(re.fullmatch(r"DS[1-5]\d\d", code) and title for code, title in CODES.items())
