"""The time that all regular expressions of a spec may take together."""

import pytest
from torch import nn

from deltaspec.backbone.observations import Observations
from deltaspec.backbone.tabulate import tabulate
from deltaspec.diagnostics.findings import DeltaSpecError
from deltaspec.language.load import load
from deltaspec.planning.resolve import resolve
from deltaspec.selection.clock import OverTimeError, ticking, timed


def test_many_regexes_share_one_budget_and_end_in_one_finding(monkeypatch):
    monkeypatch.setattr("deltaspec.selection.clock.TOTAL_SECONDS", 0.0)
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    deltas = [{"name": f"d{i}", "method": "lora", "target": {"regex": [f"{i}", r"\d"]}} for i in range(2)]
    spec = load({"deltaspec": 1, "deltas": deltas})
    with pytest.raises(DeltaSpecError) as caught:
        resolve([spec], tabulate(model), Observations(model))
    (found,) = caught.value.diagnostics
    assert (found.code, found.where) == ("DS307", "deltas[0].target.regex[0]")
    assert "the regular expressions up to this one take more than 0.0 s" in found.message


def test_a_budget_ends_with_what_it_is_for(monkeypatch):
    monkeypatch.setattr("deltaspec.selection.clock.TOTAL_SECONDS", 0.0)
    for _ in range(2):
        with timed(), timed():
            with ticking():
                sum(range(1000))
            with pytest.raises(OverTimeError), ticking():
                pass
    with ticking():  # outside of any budget
        pass
