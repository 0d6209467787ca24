"""Findings: their text, their order, and the error that carries them."""

import pickle

from deltaspec.diagnostics.findings import DeltaSpecError, Diagnostic, in_order


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


def test_findings_are_sorted_by_place_once_each():
    a, b, c = (Diagnostic("DS201", "m", "f", line, 1) for line in (1, 2, 3))
    assert in_order([c, a, b, a]) == [a, b, c]
