"""The identity of a delta: by content, whatever it is called, wherever and beside whatever it is saved."""

from __future__ import annotations

import hashlib
import json

import golden_set
import pytest
import torch
from saved_set import rewrite
from tiny_models import base

import deltaspec
from deltaspec.diagnostics.findings import DeltaSpecError, UnknownDeltaError
from deltaspec.storage.identity import identity_of
from deltaspec.storage.saved import SavedSet


def written(folder):
    entries = json.loads((folder / "manifest.json").read_text())["deltas"]
    return {entry["name"]: entry["identity"] for entry in entries}


def locked(folder, name):
    return json.loads((folder / SavedSet(folder).entry[name]["lock"]).read_text())


def test_content_has_an_identity_and_names_do_not_count(tmp_path):
    compiled = golden_set.save(tmp_path / "a")
    compiled.only("bias")
    compiled.save(tmp_path / "b", "low")
    renamed = json.loads(json.dumps(golden_set.SPEC).replace('"low"', '"other"').replace("tweets", "posts"))
    other = deltaspec.compile(base("llama"), renamed)
    with torch.no_grad():
        for mine, yours in zip(other.deltas["other"].parameters(), compiled.deltas["low"].parameters(), strict=True):
            mine.copy_(yours)
    other.save(tmp_path / "c")
    one = written(tmp_path / "a")["low"]
    assert (
        one
        == written(tmp_path / "b")["low"]
        == written(tmp_path / "c")["other"]
        == identity_of(SavedSet(tmp_path / "a"), "low")
    )
    assert one.startswith("sha256:") and len(one) == 7 + 64
    assert written(tmp_path / "a")["bias"] != one


@pytest.mark.parametrize("change", ["tensor", "alpha", "base"])
def test_another_content_has_another_identity(tmp_path, change):
    compiled = golden_set.build()
    compiled.save(tmp_path / "a")
    if change == "tensor":
        with torch.no_grad():
            next(compiled.deltas["low"].parameters()).view(-1)[0] += 1
    elif change == "alpha":
        spec = json.loads(json.dumps(golden_set.SPEC).replace('"rank": 2', '"rank": 2, "alpha": 3'))
        state, compiled = compiled.state_dict(), deltaspec.compile(base("llama"), spec)
        compiled.load_state_dict(state)
    else:
        model = golden_set.base("llama")
        other = type(model)(model.config).eval()
        other.load_state_dict({k: v + (k == "lm_head.weight") for k, v in model.state_dict().items()})
        state, compiled = compiled.state_dict(), deltaspec.compile(other, golden_set.SPEC)
        compiled.load_state_dict({key: value for key, value in state.items() if "deltaspec" in key}, strict=False)
    compiled.save(tmp_path / "b")
    assert written(tmp_path / "a")["low"] != written(tmp_path / "b")["low"]


def test_a_head_that_is_drawn_anew_and_saved_as_a_delta_does_not_count(tmp_path):
    spec = {"deltaspec": 1, "deltas": [golden_set.SPEC["deltas"][0], {"name": "head", "method": "full"}]}
    seen = set()
    for seed in range(2):
        model = golden_set.base("llama")
        other = type(model)(model.config).eval()
        with torch.no_grad():
            state = model.state_dict()
            other.load_state_dict(state | {"lm_head.weight": state["lm_head.weight"] * (1 + seed)})
        deltaspec.compile(other, spec).save(tmp_path / str(seed))
        seen.add(written(tmp_path / str(seed))["low"])
    assert len(seen) == 1


def test_earlier_sets_have_one_too_and_a_wrong_one_is_refused(tmp_path):
    golden_set.save(tmp_path)
    one = written(tmp_path)["low"]
    rewrite(tmp_path, lambda data: [entry.pop("identity") for entry in data["deltas"]])
    assert identity_of(SavedSet(tmp_path), "low") == one
    assert deltaspec.restore(base("llama"), tmp_path).attached == ("low",)
    rewrite(tmp_path, lambda data: data["deltas"][0].update(identity="sha256:" + "0" * 64))
    with pytest.raises(DeltaSpecError, match=r"says that low is sha256:000000000000…, and its files make it") as raised:
        golden_set.build().library(tmp_path, by="identity")
    assert [finding.code for finding in raised.value.diagnostics] == ["DS522"]


@pytest.mark.parametrize(
    "damage",
    [
        lambda delta: delta.pop("groups"),
        lambda delta: delta.update(groups=5),
        lambda delta: delta.update(groups=[5]),
        lambda delta: delta.update(params=None),
        lambda delta: delta.update(method=[]),
    ],
)
def test_a_lock_that_was_changed_with_its_digest_is_a_finding(damage, tmp_path):
    golden_set.save(tmp_path)
    file = tmp_path / SavedSet(tmp_path).entry["low"]["lock"]
    data = json.loads(file.read_bytes())
    damage(data["deltas"]["low"])
    file.write_text(json.dumps(data))
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    rewrite(tmp_path, lambda found: [e.update(lock_sha256=digest) for e in found["deltas"] if e["name"] == "low"])
    with pytest.raises(DeltaSpecError, match=r"DS522. is no lock"):
        identity_of(SavedSet(tmp_path), "low")


def test_a_library_knows_deltas_by_their_content(tmp_path):
    compiled = golden_set.save(tmp_path / "a")
    compiled.save(tmp_path / "b", "low")  # the same content twice is no clash
    names = written(tmp_path / "a")
    server = deltaspec.compile(base("llama"), {"deltaspec": 1, "deltas": [{"name": "x", "method": "bitfit"}]})
    assert set(server.library(tmp_path, by="identity").names) == set(names.values())
    server.only(names["low"][:11])
    assert server.attached == (names["low"],)
    compiled.only("low")
    with torch.no_grad():
        assert torch.equal(server(**golden_set.INPUTS).logits, compiled(**golden_set.INPUTS).logits)
    server.only({names["bias"][:12]: 0.5})
    server.attach(names["low"][:15], strength=0.25)
    assert dict(server.strengths) == {names["low"]: 0.25, names["bias"]: 0.5}
    server.detach(names["low"][:20])
    with pytest.raises(UnknownDeltaError):
        server.attach("sha256:")


def test_lineage_is_in_the_lock(tmp_path, monkeypatch):
    half = {"name": "half", "from": {"low": 0.5}, "combine": "linear"}
    compiled = deltaspec.compile(base("llama"), {"deltaspec": 1, "deltas": [*golden_set.SPEC["deltas"], half]})
    monkeypatch.setattr(compiled.backbone.config, "_name_or_path", "org/tiny")
    monkeypatch.setattr(compiled.backbone.config, "_commit_hash", "8a3f", raising=False)
    compiled.save(tmp_path)
    names = written(tmp_path)
    assert locked(tmp_path, "half")["lineage"] == {
        "base": {"id": "org/tiny", "revision": "8a3f"},
        "parents": {"low": names["low"]},
    }
    assert locked(tmp_path, "bias")["lineage"] == {"base": {"id": "org/tiny", "revision": "8a3f"}}
    assert locked(tmp_path, "low")["deltas"]["low"]["provenance"] == {"data": "tweets", "steps": [1, 2]}
    saved = deltaspec.load(tmp_path / SavedSet(tmp_path).entry["low"]["spec"])
    assert saved.deltas[0].provenance == {"data": "tweets", "steps": [1, 2]}


def test_params_of_training_and_of_the_start_do_not_count(tmp_path):
    compiled = golden_set.build()
    compiled.save(tmp_path / "a")
    spec = json.loads(json.dumps(golden_set.SPEC).replace('"rank": 2', '"rank": 2, "dropout": 0.3, "init": "normal"'))
    other = deltaspec.compile(base("llama"), spec)
    other.load_state_dict(compiled.state_dict())
    other.save(tmp_path / "b")
    assert written(tmp_path / "a") == written(tmp_path / "b")
