"""Some deltas of many: saved, restored and loaded by name; sets whose parts do not belong together are refused."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import pytest
import torch
from encoders import HEAD, LORA, encoder, logits, saved, trained
from saved_set import CHOSEN, build, manifest, refused, rewrite, run
from torch import nn
from transformers import BertForSequenceClassification

import deltaspec
from deltaspec.diagnostics.findings import DeltaSpecError, UnknownDeltaError

SOURCES = [LORA | {"name": name, "attached": False} for name in ("french", "legal")]
MIX = {"name": "mix", "from": {"french": 0.7, "legal": 0.3}, "combine": "linear"}


def test_some_of_a_model(tmp_path):
    compiled = build()
    compiled.save(tmp_path, "low", "norms")
    assert [entry["name"] for entry in manifest(tmp_path)["deltas"]] == ["norms", "low"]
    assert deltaspec.restore(CHOSEN.model(), tmp_path, "low").attached == ("low",)
    back = deltaspec.restore(CHOSEN.model(), tmp_path)
    compiled.only("norms", "low")
    assert torch.equal(run(back), run(compiled))
    other = build(number=5)
    kept = {key: value.clone() for key, value in other.deltas["norms"].tensors()}
    other.load(tmp_path, "low")
    assert all(torch.equal(kept[key], value) for key, value in other.deltas["norms"].tensors())
    assert all(torch.equal(compiled.deltas["low"].tensor(key), value) for key, value in other.deltas["low"].tensors())
    for forbidden in (
        lambda: compiled.save(tmp_path / "x", "none"),
        lambda: compiled.load(tmp_path, "wide"),
        lambda: deltaspec.restore(CHOSEN.model(), tmp_path, "wide"),
        lambda: compiled.library(tmp_path, "none"),
    ):
        with pytest.raises(UnknownDeltaError):
            forbidden()


def test_derived_deltas_come_with_their_sources_and_sources_alone(tmp_path):
    source = trained(encoder(), *SOURCES, MIX).refresh("mix")
    wanted = logits(source)
    source.save(tmp_path / "mix", "mix")
    back = deltaspec.restore(encoder(), tmp_path / "mix")
    assert set(back.deltas) == {"french", "legal", "mix"} and torch.equal(logits(back), wanted)
    assert set(deltaspec.restore(encoder(), tmp_path / "mix", "legal").deltas) == {"legal"}
    source.save(tmp_path / "french", "french")
    assert set(deltaspec.restore(encoder(), tmp_path / "french").deltas) == {"french"}


def test_a_spec_with_deltas_that_the_manifest_lacks(tmp_path):
    folder = saved(tmp_path, trained(encoder(), *SOURCES, MIX).refresh("mix"))
    rewrite(folder, lambda data: data["deltas"].pop(0))
    with pytest.raises(DeltaSpecError, match=r"DS535.*'french', which the manifest does not list"):
        deltaspec.restore(encoder(), folder)


@pytest.mark.parametrize("kind", ["surplus", "missing", "cut"])
def test_lost_and_surplus_tensors_are_listed_where_the_digest_is_wrong(saved, kind):
    from safetensors.torch import load_file, save_file

    path = saved / next(entry for entry in manifest(saved)["deltas"] if entry["name"] == "low")["file"]
    tensors = load_file(path)
    if kind == "missing":
        del tensors["head.up"], tensors["up.down"]
    else:
        tensors["tail.up"] = torch.zeros(2)
    save_file(tensors, path)
    if kind == "cut":
        path.write_bytes(path.read_bytes()[:-4])
    assert refused(saved) == ["DS522", *["DS525"] * (2 if kind == "missing" else 1)]
    with pytest.raises(DeltaSpecError) as caught:
        build(spec={"deltaspec": 1, "deltas": [{"name": "own", "method": "bitfit", "target": "head"}]}).library(
            saved, preload=True
        )
    assert [d.code for d in caught.value.diagnostics if "low" in d.message or "damaged" in d.message].count("DS525")
    assert ("up.down" if kind == "missing" else "tail.up") in str(caught.value)


def test_a_model_that_was_changed_after_it_was_compiled(tmp_path):
    source = trained(encoder(BertForSequenceClassification), LORA, HEAD)
    source.backbone.resize_token_embeddings(44)
    source.backbone.extra = nn.Linear(3, 3)
    source.save(tmp_path / "a")
    changed = encoder(BertForSequenceClassification, head=2)
    changed.resize_token_embeddings(44)
    for model in (changed, encoder(BertForSequenceClassification, head=3)):
        assert torch.equal(logits(deltaspec.restore(model, tmp_path / "a")), logits(source))
    alone = trained(encoder(BertForSequenceClassification), LORA)
    alone.backbone.classifier = nn.Linear(16, 2)
    alone.save(tmp_path / "c")  # a new head: whoever restores puts one there, too
    assert deltaspec.restore(encoder(BertForSequenceClassification, head=4), tmp_path / "c").attached == ("lora",)
    source.backbone.classifier = nn.Linear(16, 5)
    with pytest.raises(DeltaSpecError, match=r"DS536.*head: the model was changed.*classifier"):
        source.save(tmp_path / "b")
    source.save(tmp_path / "b", "lora")
    assert not (tmp_path / "b" / "head").exists()


def _as_before(folder: Any) -> None:
    """Make a set as earlier versions saved it."""
    rewrite(folder, lambda data: data["backbone"].pop("record"))


def test_sets_of_earlier_versions(saved):
    _as_before(saved)
    compiled = build()
    compiled.only("low", "norms")
    assert torch.equal(run(deltaspec.restore(CHOSEN.model(), saved)), run(compiled))
    other = CHOSEN.model()
    with torch.no_grad():
        other.head.weight[0, 0] += 1
    assert refused(saved, other) == ["DS523"]
    back = deltaspec.restore(other, saved, match="structure")
    assert 'match="structure" let pass weights of another digest' in str(back.plan).replace("\n", " ")


@pytest.mark.parametrize(
    "change",
    [
        lambda record: record.pop("tensors"),
        lambda record: record["tensors"].update({"head.weight": "float32[5,24] AAAA"}),
        lambda record: record["tensors"].update({"head.weight": "int[5,24]"}),
        lambda record: record["tensors"].update({"head.weight": 3}),
        lambda record: record["modules"].pop("Traceable"),
        lambda record: record["modules"].update({"Linear": ["{0..9999999999}"]}),
        lambda record: record.update(replaced={"bn.weight": [True]}),
        lambda record: record.update(vocabulary="many"),
        lambda record: record.update(unused=3),
    ],
)
def test_a_forged_record(saved, change):
    rewrite(saved, lambda data: change(data["backbone"]["record"]))
    assert refused(saved) == ["DS522"]


def test_a_set_does_not_change_by_being_read(saved):
    before = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in saved.iterdir()}
    again = saved.parent / "again"
    deltaspec.restore(CHOSEN.model(), saved).save(again)
    after = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in again.iterdir()}
    assert json.loads((again / "manifest.json").read_text()) == manifest(saved)
    assert before == after
