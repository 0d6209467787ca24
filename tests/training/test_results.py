"""Results: the table, the files, the curves, and what they say without matplotlib."""

import builtins
import csv
import json

import pytest

from deltaspec.training.outcome import JobResult
from deltaspec.training.results import Results


def results():
    one = JobResult("lora[rank=4,lr=1e-3]", ("a",), 4, "accuracy")
    two = JobResult("two", ("b", "c"), 4, "accuracy")
    for step, loss in enumerate((4.0, 3.0, 2.5, 2.0)):
        one.took(loss, 0.1 * step)
    one.measured({"loss": 2.0, "accuracy": 0.5})
    one.status = "finished"
    two.took(1.0, 0.1)
    two.measured({"loss": 3.0, "accuracy": 0.75})
    two.end("diverged", "its loss is nan at step 2")
    return Results([one, two])


def test_table_and_best():
    found = results()
    text = str(found)
    assert "lora[rank=4,lr=1e-3]" in text and "diverged: its loss is nan at step 2" in text and "eval accuracy" in text
    assert found.best().name == "two" and found.job("two").best["accuracy"] == 0.75 and found.job("two").step == 1
    assert JobResult.from_data(json.loads(json.dumps(found[0].to_data()))) == found[0]
    with pytest.raises(ValueError, match="no job was evaluated"):
        Results([JobResult("x", ("x",), 1, "loss")]).best()
    with pytest.raises(KeyError, match="has no measure 'f1'; there are: loss"):
        JobResult("x", ("x",), 1, "f1").measured({"loss": 1.0})


def test_not_a_number_is_never_better():
    one = JobResult("x", ("x",), 1, "loss")
    assert not one.measured({"loss": float("nan")}) and one.measured({"loss": 2.0})
    one.took(1.0, 1.0)
    assert not one.measured({"loss": float("nan")}) and one.best == {"loss": 2.0}


def test_files(tmp_path):
    found = results()
    for name in ("r.json", "r.csv", "r.txt", "curves.png", "curves.svg"):
        found.plot(tmp_path / name) if name.startswith("curves") else found.save(tmp_path / name)
    assert [each["name"] for each in json.loads((tmp_path / "r.json").read_text())] == [each.name for each in found]
    lines = list(csv.DictReader((tmp_path / "r.csv").open()))
    losses = [float(line["value"]) for line in lines if line["measure"] == "train loss" and line["job"] == "two"]
    assert losses == [1.0] and len(lines) == 4 * 2 + 2 + 2 + 2
    assert (tmp_path / "r.txt").read_text().splitlines() == str(found).splitlines()
    assert (tmp_path / "curves.png").read_bytes()[1:4] == b"PNG" and "<svg" in (tmp_path / "curves.svg").read_text()


def test_without_matplotlib(tmp_path, monkeypatch):
    own = builtins.__import__

    def without(name, *args, **kwargs):
        if name.startswith("matplotlib"):
            raise ModuleNotFoundError("no", name="matplotlib")
        return own(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'deltaspec\[train\]'"):
        results().plot(tmp_path / "x.png")
