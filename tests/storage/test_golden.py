"""Golden answers as they are kept: what is in the files, what is too much, what is damaged."""

from __future__ import annotations

import json
import os

import golden_set
import pytest
import torch
from safetensors.torch import load_file
from tiny_models import base
from torch import nn

import deltaspec
from deltaspec.diagnostics.findings import DeltaSpecError
from deltaspec.storage import golden as golden_module
from deltaspec.storage.golden import Golden, answer_of, golden_of, named_inputs
from deltaspec.storage.saved import SavedSet


def manifest(folder):
    return json.loads((folder / "manifest.json").read_text())


def codes(raised):
    return [finding.code for finding in raised.value.diagnostics]


def test_a_file_has_inputs_and_the_answers_with_and_without_the_delta(tmp_path):
    compiled = golden_set.build()
    compiled.attach("bias", strength=0.5)
    compiled.train()
    flags = {name: module.training for name, module in compiled.named_modules()}
    compiled.save(tmp_path, golden=golden_set.INPUTS)
    assert flags == {name: module.training for name, module in compiled.named_modules()}
    assert dict(compiled.strengths) == {"low": 1.0, "bias": 0.5}
    compiled.eval()
    entries = {entry["name"]: entry for entry in manifest(tmp_path)["deltas"]}
    for name, entry in entries.items():
        tensors = load_file(tmp_path / entry["golden"])
        assert tensors.keys() == {"answer", "base", "inputs.input_ids", "inputs.attention_mask"}
        assert torch.equal(tensors["inputs.input_ids"], golden_set.INPUTS["input_ids"])
        with torch.no_grad(), compiled.only(name):
            assert torch.equal(tensors["answer"], compiled(**golden_set.INPUTS).logits)
        with torch.no_grad():
            assert torch.equal(tensors["base"], base("llama")(**golden_set.INPUTS).logits)
    together = golden_of(SavedSet(tmp_path), None)
    assert together is not None and together.attached == {"low": 1.0, "bias": 0.5}
    with torch.no_grad():
        assert torch.equal(together.answer, compiled(**golden_set.INPUTS).logits)


def test_one_delta_alone_is_kept_once_and_saving_again_clears_what_was_kept(tmp_path):
    compiled = golden_set.save(tmp_path)
    assert "golden" not in manifest(tmp_path)  # `low` alone is attached, which its own file says
    assert sum(name.endswith(".golden.safetensors") for name in os.listdir(tmp_path)) == 2
    compiled.save(tmp_path)
    assert not [name for name in os.listdir(tmp_path) if "golden" in name]
    assert deltaspec.restore(base("llama"), tmp_path).attached == ("low",)


@pytest.mark.parametrize(
    ("inputs", "said"),
    [
        ({"input_ids": torch.zeros(1, 2, dtype=torch.long), "use_cache": False}, "'use_cache' is a bool"),
        ({}, "there are none"),
    ],
)
def test_inputs_that_are_no_tensors_are_refused_and_nothing_is_written(tmp_path, inputs, said):
    golden_set.save(tmp_path)
    before = {name: (tmp_path / name).read_bytes() for name in os.listdir(tmp_path)}
    with pytest.raises(DeltaSpecError, match=said) as raised:
        golden_set.build(2).save(tmp_path, golden=inputs)
    assert codes(raised) == ["DS550"]
    assert before == {name: (tmp_path / name).read_bytes() for name in os.listdir(tmp_path)}


def test_answers_that_are_too_large_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(golden_module, "MOST_BYTES", 1000)
    with pytest.raises(DeltaSpecError, match="at most 0 MiB are kept") as raised:
        golden_set.save(tmp_path)
    assert codes(raised) == ["DS550"] and not os.listdir(tmp_path)


def test_the_answer_is_the_logits_or_the_first_tensor_of_numbers():
    ids, numbers = torch.ones(2, dtype=torch.long), torch.ones(3)
    assert answer_of({"loss": ids, "logits": numbers}) is numbers
    assert answer_of((ids, [{"a": None, "b": numbers}])) is numbers
    assert list(named_inputs((numbers, ids))) == ["0", "1"]
    with pytest.raises(DeltaSpecError, match="no tensor of numbers"):
        answer_of({"a": ids})


def test_plain_modules_are_called_with_positions(tmp_path):
    net = nn.Sequential(nn.Linear(4, 3))
    spec = {"deltaspec": 1, "deltas": [{"name": "d", "method": "full", "target": {"type": "Linear"}}]}
    deltaspec.compile(net, spec).save(tmp_path, golden=torch.ones(2, 4))
    kept = golden_of(SavedSet(tmp_path), "d")
    assert kept is not None and list(kept.inputs) == ["0"] and torch.equal(kept.answer, net(torch.ones(2, 4)))
    assert deltaspec.restore(net, tmp_path).verify(tmp_path)


@pytest.mark.parametrize("damage", ["content", "other", "digest", "name", "type"])
def test_damaged_answers_are_one_error(tmp_path, damage):
    golden_set.save(tmp_path)
    data = manifest(tmp_path)
    entry = data["deltas"][0]
    if damage == "content":
        (tmp_path / entry["golden"]).write_bytes(b"x" * 20)
    elif damage == "other":
        entry["golden"], entry["golden_sha256"] = entry["file"], entry["file_sha256"]
    elif damage == "digest":
        del entry["golden_sha256"]
    else:
        entry["golden"] = "../x.01234567.golden.safetensors" if damage == "name" else 3
    (tmp_path / "manifest.json").write_text(json.dumps(data))
    with pytest.raises(DeltaSpecError) as raised:
        golden_of(SavedSet(tmp_path), "low")
    assert codes(raised) == ["DS522"]


def test_what_is_no_golden_file_is_a_value_error():
    whole = Golden({"0": torch.ones(1)}, {"d": 1.0}, torch.ones(2), torch.ones(2)).to_bytes()
    assert Golden.from_bytes(whole).attached == {"d": 1.0}
    for wrong in (b"", whole[:50], whole[:-4], whole.replace(b"answer", b"anewer"), whole.replace(b'\\"d\\"', b"[1, ")):
        with pytest.raises(ValueError, match="is no file of golden answers"):
            Golden.from_bytes(wrong)
