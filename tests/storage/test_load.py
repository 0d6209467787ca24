"""Reading saved deltas: tensors that do not fit are refused, all findings at once, and nothing is changed then."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import pytest
import torch
from models import Traceable
from one_delta import single
from saved_set import CHOSEN, SPEC, build, forge, manifest, refused, rewrite, run, state
from torch import Tensor, nn

import deltaspec
from deltaspec.diagnostics.findings import DeltaSpecError
from deltaspec.storage.saved import SavedSet


@pytest.mark.parametrize(
    "change",
    [
        lambda tensors: tensors.pop("head.up"),
        lambda tensors: tensors.update({"tail.up": torch.zeros(2)}),
    ],
    ids=["missing", "surplus"],
)
def test_missing_and_surplus_tensors(saved, change):
    forge(saved, "low", change)
    assert refused(saved) == ["DS525"]


@pytest.mark.parametrize(
    ("key", "value", "code"),
    [
        ("head.up", torch.zeros(3, 5), "DS526"),
        ("head.up", torch.zeros(5, 3, 1), "DS526"),
        ("head.up", torch.zeros(5, 3, dtype=torch.int64), "DS526"),
        ("head.up", torch.zeros(5, 3, dtype=torch.float8_e5m2), "DS526"),
        ("head.up", torch.full((5, 3), float("nan")), "DS527"),
        ("head.up", torch.full((5, 3), float("-inf")), "DS527"),
    ],
    ids=["transposed", "rank", "integers", "float8", "nan", "inf"],
)
def test_tensors_that_do_not_fit(saved, key, value, code):
    forge(saved, "low", lambda tensors: tensors.update({key: value}))
    assert refused(saved) == [code]


def test_all_findings_come_at_once(saved):
    def damage(tensors: dict[str, Tensor]) -> None:
        del tensors["up.up"]
        tensors["up.sideways"] = torch.zeros(1)
        tensors["up.down"] = torch.zeros(1, 1)
        tensors["head.up"] = torch.full((5, 3), float("nan"))

    forge(saved, "low", damage)
    entry = next(e for e in manifest(saved)["deltas"] if e["name"] == "wide")
    (saved / entry["file"]).unlink()
    assert refused(saved) == ["DS521", "DS525", "DS525", "DS526", "DS527"]


def test_a_delta_that_the_model_lacks(saved):
    spec = {"deltaspec": 1, "deltas": [{"name": "norms", "method": "full", "target": ["bn", "norm"]}]}
    compiled = build(spec=spec)
    kept = state(compiled)
    with pytest.raises(DeltaSpecError) as caught:
        compiled.load(saved)
    assert [d.code for d in caught.value.diagnostics] == ["DS524", "DS524"]
    spec = next(e["spec"] for e in manifest(saved)["deltas"] if e["name"] != "norms")
    assert f'c.add("{saved / spec}"), then load' in str(caught.value)
    assert all(torch.equal(kept[key], value) for key, value in state(compiled).items())


def test_a_model_with_more_deltas_loads_those_that_were_saved(saved):
    more = json.loads(json.dumps(SPEC))
    more["deltas"].append({"name": "extra", "method": "bitfit", "target": "head"})
    compiled = build(number=4, spec=more)
    kept = {key: value.clone() for key, value in compiled.deltas["extra"].tensors()}
    compiled.load(saved)
    assert all(torch.equal(kept[key], value) for key, value in compiled.deltas["extra"].tensors())
    compiled.only("norms", "low")
    assert torch.equal(run(compiled), run(deltaspec.restore(CHOSEN.model(), saved)))


@pytest.mark.parametrize("text", ['{"deltas": [{"name": "low", "params": 3}]}', "[" * 100_000, "[]", "null"])
def test_a_forged_spec_is_not_loaded(saved, text):
    compiled = build(number=2)
    before = state(compiled)
    (saved / manifest(saved)["deltas"][1]["spec"]).write_text(text)
    digest = hashlib.sha256(text.encode()).hexdigest()
    rewrite(saved, lambda data: data["deltas"][1].update(spec_sha256=digest))
    with pytest.raises(DeltaSpecError, match="DS522"):
        compiled.load(saved)
    assert all(torch.equal(before[key], value) for key, value in state(compiled).items())


def test_a_model_without_values_is_neither_saved_nor_loaded(saved):
    with torch.device("meta"):
        model = Traceable().eval()
    for forbidden in (lambda: build(model).save(saved), lambda: deltaspec.restore(model, saved)):
        files = {path: path.read_bytes() for path in saved.iterdir()}
        with pytest.raises(DeltaSpecError) as caught:
            forbidden()
        assert [d.code for d in caught.value.diagnostics] == ["DS534"] * 3
        assert files == {path: path.read_bytes() for path in saved.iterdir()}


@pytest.mark.parametrize("read", ["load", "restore", "library"])
def test_reading_while_the_deltas_are_saved_again_gives_the_new_ones(tmp_path, monkeypatch, read):
    old, new = build(number=1), build(number=2)
    old.save(tmp_path)
    real, calls = SavedSet.read, []

    def once_saved_again(saved: SavedSet, name: str, field: str) -> Any:
        calls.append(name)
        if len(calls) == 4:
            new.save(tmp_path)
        return real(saved, name, field)

    monkeypatch.setattr(SavedSet, "read", once_saved_again)
    if read == "restore":
        assert torch.equal(run(deltaspec.restore(CHOSEN.model(), tmp_path)), run(new))
    elif read == "load":
        assert torch.equal(run(build(number=3).load(tmp_path)), run(new))
    else:  # it knows the deltas as they were, and says so
        known = build(spec={"deltaspec": 1, "deltas": [{"name": "own", "method": "bitfit", "target": "head"}]})
        known.library(tmp_path)
        new.save(tmp_path)
        with pytest.raises(DeltaSpecError, match="DS521.*saved again in the meantime"):
            known.only("low")


def test_loading_compares_what_the_tensors_mean(tmp_path):
    model = nn.Sequential(nn.Linear(4, 4))
    deltaspec.compile(model, single(rank=2)).save(tmp_path)
    other = deltaspec.compile(model, single(rank=2, alpha=99.0))
    with pytest.raises(DeltaSpecError, match=r"DS529.*params.alpha was 16.0.*99.0"):
        other.load(tmp_path)
    deltaspec.compile(model, single(rank=2, dropout=0.5)).load(tmp_path)
