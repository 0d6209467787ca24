"""Passes by name: in a call, and in a spec."""

from __future__ import annotations

import pytest

import deltaspec
from deltaspec.language.passes import ALL, chosen

DELTA = {"name": "a", "method": "lora", "target": "q"}


def spec(**more: object) -> dict[str, object]:
    return {"deltaspec": 1, "deltas": [DELTA], **more}


def test_what_a_call_chooses():
    assert chosen(True) == ALL and chosen(False) == chosen(()) == frozenset()
    assert chosen("recompute") == chosen(["recompute"]) == {"recompute"}


def test_unknown_names_are_all_reported():
    with pytest.raises(deltaspec.DeltaSpecError) as caught:
        chosen(["recompte", "recompute", "x"])
    first, second = caught.value.diagnostics
    assert (first.code, second.code) == ("DS480", "DS480")
    assert "did you mean 'recompute'?" in first.suggestion and "known: recompute, " in second.suggestion


@pytest.mark.parametrize(
    ("written", "allowed"),
    [(None, ALL), (True, ALL), (False, frozenset()), ([], frozenset()), (["dropout"], {"dropout"})],
)
def test_what_a_spec_allows(written, allowed):
    loaded = deltaspec.load(spec() if written is None else spec(passes=written))
    assert loaded.allowed_passes == allowed
    again = deltaspec.load(loaded.to_data())
    assert again.allowed_passes == allowed and again == loaded


def test_a_spec_that_says_nothing_of_it_is_written_as_before():
    assert "passes" not in deltaspec.load(spec()).to_data()
    assert deltaspec.load(spec(passes=True)).digest == deltaspec.load(spec()).digest
    assert deltaspec.load(spec(passes=sorted(ALL))).digest == deltaspec.load(spec()).digest


@pytest.mark.parametrize("written", [["recompte"], "recompute", 1, ["recompute", "recompute"]])
def test_what_is_none_is_a_finding_with_a_place(written):
    with pytest.raises(deltaspec.DeltaSpecError) as caught:
        deltaspec.load(spec(passes=written))
    assert all(finding.code.startswith("DS2") and "passes" in str(finding) for finding in caught.value.diagnostics)
