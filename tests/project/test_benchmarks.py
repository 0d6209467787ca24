"""The benchmarks' own code, on made-up timings: nothing is timed here."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import harness
from benchmarks.__main__ import main
from benchmarks.groups import GROUPS, Group
from benchmarks.harness import Limits, Row, Series, Table, excess, interleave, quartiles, ratio, seconds
from benchmarks.plots import PLOTS, apart, draw
from benchmarks.results import merged, read, render

NOTHING: dict[str, Any] = {"runs": {}, "groups": {}}
TITLES = {"first": "The first", "second": "The second"}


def row(what: str, met: str = "-", ours: str = "1 ms") -> Row:
    return Row(what, ours, "2 ms", "2 (1–3) × faster", "≥ 2 ×", met, f"why {what}" if met == "no" else "")


def names(data: dict[str, Any], group: str) -> list[tuple[str, str]]:
    return [(found["what"], found["run"]) for found in data["groups"][group]["rows"]]


# The harness


def test_contestants_take_turns_and_the_warm_up_is_not_counted():
    turns: list[str] = []
    times = interleave({"a": lambda: turns.append("a"), "b": lambda: turns.append("b")}, pairs=3, warm_up=2)
    assert "".join(turns) == "ab" * 5
    assert {name: len(found) for name, found in times.items()} == {"a": 3, "b": 3}


def test_what_comes_before_is_handed_over_and_not_timed(monkeypatch):
    clock = iter(range(100))
    monkeypatch.setattr(harness.time, "perf_counter", lambda: next(clock))
    seen: list[int] = []
    prepared = iter(range(10))

    def prepare() -> int:
        next(clock)  # takes a second
        return next(prepared)

    times = interleave({"a": seen.append}, pairs=2, warm_up=1, before={"a": prepare})
    assert seen == [0, 1, 2]
    assert times["a"] == [1, 1]


def test_a_trial_is_bounded(monkeypatch):
    monkeypatch.setattr(harness, "LIMITS", Limits(pairs=2, loaded=10))
    assert len(interleave({"a": lambda: None}, pairs=40)["a"]) == 2
    assert harness.LIMITS.counts(1, 10, 100) == (1, 10)
    assert Limits().counts(1, 10, 100) == (1, 10, 100)


def test_ratios_are_medians_over_pairs():
    # The second pair was disturbed as a whole, which its ratio does not show.
    assert ratio([2.0, 200.0, 2.0, 2.2, 1.8], [1.0, 100.0, 1.0, 1.0, 1.0]) == (2.0, "2 (1.9–2.1)")
    assert ratio([4.0] * 3, [2.0] * 3, scale=100) == (200.0, "200 (200–200)")
    assert quartiles([1.0, 2.0, 3.0, 4.0, 5.0]) == (1.5, 3.0, 4.5)
    first, second, part, text = excess([1.1] * 3, [1.4] * 3, [1.0] * 3)
    assert (first, second, round(part, 6)) == (1.1, 1.4, 0.25)
    assert text == "0.25 of the peer's excess"


@pytest.mark.parametrize(("value", "text"), [(2.0, "2 s"), (0.0123, "12.3 ms"), (4.5e-6, "4.5 µs"), (3e-8, "30 ns")])
def test_times_are_written_in_a_readable_unit(value, text):
    assert seconds([value] * 3) == text


# Results


def test_a_partial_run_leaves_the_rows_of_other_groups():
    data = merged(NOTHING, "monday", {"torch": "1"}, "first", [row("a"), row("b")])
    data = merged(data, "monday", {"torch": "1"}, "second", [row("c")])
    data = merged(data, "tuesday", {"torch": "2"}, "first", [row("b", ours="3 ms")])
    assert names(data, "first") == [("b", "tuesday")]
    assert names(data, "second") == [("c", "monday")]
    assert data["runs"] == {"monday": {"torch": "1"}, "tuesday": {"torch": "2"}}
    data = merged(data, "tuesday", {"torch": "2"}, "second", [row("c")])
    assert list(data["runs"]) == ["tuesday"]  # nothing is left of the other


def test_a_failed_group_keeps_what_it_did_not_come_to():
    before = merged(NOTHING, "monday", {}, "first", [row("a"), row("b"), Table("t", ("x",), (("1",),))])
    data = merged(before, "tuesday", {}, "first", [row("a")], failed="ValueError: no")
    assert names(data, "first") == [("a", "tuesday"), ("b", "monday")]
    assert data["groups"]["first"]["tables"][0]["run"] == "monday"
    text = render(data, TITLES)
    assert "**The last run of this group failed** (ValueError: no)" in text
    assert "`python -m benchmarks first`, monday (only: b)" in text
    healed = merged(data, "wednesday", {}, "first", [row("a")])
    assert names(healed, "first") == [("a", "wednesday")]
    assert "failed" not in render(healed, TITLES)


def test_the_text_names_misses_notes_and_runs():
    data = merged(NOTHING, "monday", {"torch": "2.13"}, "second", [row("a", "yes"), row("b", "no"), row("c")])
    data = merged(data, "monday", {"torch": "2.13"}, "gone", [row("x", "no")])
    text = render(data, TITLES, ["switching"])
    assert "1 of 2 targets are met. Missed:\n\n- b: 2 (1–3) × faster, target ≥ 2 ×" in text
    assert "| b | 1 ms | 2 ms | 2 (1–3) × faster | ≥ 2 × | **no** |" in text
    assert "- **b**: why b" in text
    assert "`python -m benchmarks second`, monday: torch 2.13." in text
    assert "![switching](plots/switching.svg)" in text
    assert "Not measured yet: first." in text
    assert "x |" not in text  # its group is no more


def test_tables_are_written():
    table = Table("Over the rank", ("rank", "forward"), (("1", "1.1 ×"), ("2", "1.2 ×")), "On a small model.")
    text = render(merged(NOTHING, "monday", {}, "first", [table]), TITLES)
    assert "**Over the rank**\n\n| rank | forward |\n| --- | --- |\n| 1 | 1.1 × |\n| 2 | 1.2 × |\n\nOn a small" in text


def test_results_of_an_older_form_are_left_behind(tmp_path):
    assert read(tmp_path / "results.json") == NOTHING
    (tmp_path / "results.json").write_text('{"rows": []}', encoding="utf-8")
    assert read(tmp_path / "results.json") == NOTHING


# Running


def works():
    """Return a row and a curve."""
    yield row("works", "yes")
    yield Series.of("tokens", "deltaspec", {1.0: [1.2, 1.3, 1.1], 16.0: [1.1, 1.1, 1.2]})


def fails():
    """Return a row, then fail."""
    yield row("half")
    raise ValueError("no such thing\nas a second line")


KNOWN = {
    "fails": Group("fake:fails", "Fails"),
    "works": Group("fake:works", "Works"),
    "absent": Group("absent:nothing", "Absent"),
}


@pytest.fixture
def trial(tmp_path, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "benchmarks.fake", sys.modules[__name__])
    monkeypatch.setattr(harness.LIMITS, "pairs", None)
    monkeypatch.setattr(harness.LIMITS, "loaded", None)
    return ["--trial", str(tmp_path)]


def test_a_failing_group_does_not_lose_the_others(trial, tmp_path, capsys):
    assert main(trial, KNOWN) == 1
    data = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))
    assert [found["what"] for found in data["groups"]["works"]["rows"]] == ["works"]
    assert [found["what"] for found in data["groups"]["fails"]["rows"]] == ["half"]
    printed = capsys.readouterr().err
    assert "failed: fails: ValueError: no such thing\n" in printed
    assert "failed: absent: ModuleNotFoundError: No module named 'benchmarks.absent'" in printed
    text = (tmp_path / "RESULTS.md").read_text(encoding="utf-8")
    assert "![tokens](plots/tokens.svg)" in text
    assert (tmp_path / "plots/tokens.svg").exists()


def test_groups_are_chosen_by_name(trial, tmp_path):
    assert main([*trial, "works"], KNOWN) == 0
    assert main([*trial, "plots"], KNOWN) == 0
    assert list(read(tmp_path / "results.json")["groups"]) == ["works"]
    with pytest.raises(SystemExit):
        main([*trial, "nothing"], KNOWN)


@pytest.mark.parametrize("name", GROUPS)
def test_every_group_can_be_loaded(name):
    assert callable(GROUPS[name].load())


def test_plots_of_the_same_curves_are_the_same_files(tmp_path):
    points = {1.0: [1e-5, 2e-5, 3e-5], 10.0: [1e-5, 2e-5, 4e-5], 1000.0: [2e-5, 2e-5, 2e-5]}
    series = [Series.of("switching", "deltaspec", points), Series.of("switching", "PEFT, set_adapter", points)]
    series += [Series.of("mixing", "PEFT", points), Series.of("tokens", "PEFT, merged", points)]
    data = merged(NOTHING, "monday", {}, "first", series)
    for folder in ("one", "two"):
        draw(data, tmp_path / folder)
    for name in PLOTS:
        assert Path(tmp_path, "one", f"{name}.svg").read_bytes() == Path(tmp_path, "two", f"{name}.svg").read_bytes()


def test_labels_are_moved_apart_as_little_as_they_can_be():
    assert apart([0.0, 30.0], 10) == [0.0, 30.0]
    assert apart([0.0, 2.0], 10) == [-4.0, 6.0]
    assert apart([0.0, 1.0, 2.0, 50.0], 10) == [-9.0, 1.0, 11.0, 50.0]
    assert apart([0.0, 9.0, 9.0], 10) == [-4.0, 6.0, 16.0]
