"""The standard ways of saving: what is written reloads with the deltas, or is the plain model, or is refused."""

import copy
import json
import pickle
from types import SimpleNamespace

import huggingface_hub
import pytest
import torch
from models import ARCHITECTURES
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModel, BertForSequenceClassification, BertModel
from two_deltas import build, logits

import deltaspec
from deltaspec.diagnostics.findings import DeltaSpecError


def whole(compiled):
    return compiled


def backbone(compiled):
    return compiled.backbone


@pytest.mark.parametrize("of", [whole, backbone])
def test_what_is_saved_is_restored_with_the_deltas_and_is_no_model(of, tmp_path):
    compiled = build("bert")
    compiled.backbone.config._name_or_path = "org/base"
    compiled.only("low")
    of(compiled).save_pretrained(tmp_path, max_shard_size="1GB")
    back = deltaspec.restore(plain(), tmp_path)
    assert back.attached == ("low",) and torch.equal(logits(back, "bert"), logits(compiled, "bert"))
    assert not (tmp_path / "config.json").exists()
    with pytest.raises((OSError, ValueError)):
        AutoModel.from_pretrained(tmp_path)
    card = (tmp_path / "README.md").read_text()
    assert "base_model: org/base" in card and "deltaspec.restore(model" in card
    keys = load_file(tmp_path / "model.safetensors").keys()
    assert keys and all(key.startswith("deltaspec.") for key in keys)
    fresh = build("bert")
    for model in (fresh, fresh.backbone):
        assert model.load_state_dict(load_file(tmp_path / "model.safetensors"), strict=False).unexpected_keys == []


def plain():
    return ARCHITECTURES["bert"].model()


def test_detached_and_merged_models_are_saved_as_plain_ones(tmp_path):
    compiled = build("bert")
    merged = compiled.merge("low")
    compiled.only("low")
    expected = logits(compiled, "bert")
    merged.save_pretrained(tmp_path / "merged")
    loaded = BertForSequenceClassification.from_pretrained(tmp_path / "merged")
    assert torch.allclose(logits(loaded, "bert"), expected, atol=1e-5)
    with compiled.detached():
        compiled.save_pretrained(tmp_path / "bare", state_dict=compiled.backbone.state_dict())
        bare = logits(compiled, "bert")
    loaded = BertForSequenceClassification.from_pretrained(tmp_path / "bare")
    assert torch.equal(logits(loaded, "bert"), bare)
    assert not any("deltaspec" in key for key in load_file(tmp_path / "bare" / "model.safetensors"))


def test_rows_of_batches_count_as_used(tmp_path):
    compiled = build("bert")
    compiled.detach()
    compiled.rows(["low", None])
    compiled.save_pretrained(tmp_path)
    assert (tmp_path / "manifest.json").exists() and not (tmp_path / "config.json").exists()


@pytest.mark.parametrize("way", [copy.deepcopy, lambda c: c.view(), lambda c: pickle.loads(pickle.dumps(c))])
def test_copies_and_views_save_what_is_theirs(way, tmp_path):
    compiled = build("bert")
    twin = way(compiled)
    twin.only("wide")
    twin.backbone.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "manifest.json").read_text())["attached"] == ["wide"]
    assert compiled.attached == ("low", "wide")


def test_a_model_inside_would_leave_the_deltas_out(tmp_path):
    compiled = build("bert")
    with pytest.raises(DeltaSpecError, match=r"(?s)BertModel.*c\.save\(dir\).*c\.merge\(\)\.save_pretrained"):
        compiled.backbone.bert.save_pretrained(tmp_path)
    compiled.detach()
    compiled.backbone.bert.save_pretrained(tmp_path)
    assert isinstance(BertModel.from_pretrained(tmp_path), BertModel)


def test_other_values_in_a_state_dict_are_not_lost(tmp_path):
    compiled = build("bert")
    state = compiled.backbone.state_dict()
    compiled.save_pretrained(tmp_path, state_dict=state)
    key = next(key for key in state if key.startswith("deltaspec."))
    state[key] = state[key] + 1
    with pytest.raises(DeltaSpecError, match="DS477"):
        compiled.save_pretrained(tmp_path, state_dict=state)
    with pytest.raises(TypeError, match="nonsense"):
        compiled.save_pretrained(tmp_path, nonsense=1)
    compiled.save_pretrained(tmp_path / "second", is_main_process=False)
    assert not (tmp_path / "second").exists()


def test_push_to_hub_uploads_what_restores(monkeypatch, tmp_path):
    uploads = []

    def create(self, repo_id, **_):
        return SimpleNamespace(repo_id=f"me/{repo_id}")

    def upload(self, *, repo_id, folder_path, **rest):
        uploads.append((repo_id, rest["commit_message"], sorted(p.name for p in folder_path.iterdir())))
        back = deltaspec.restore(plain(), folder_path)
        assert back.attached == ("low", "wide")

    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", create)
    monkeypatch.setattr(huggingface_hub.HfApi, "upload_folder", upload)
    compiled = build("bert")
    compiled.push_to_hub("deltas", private=True, commit_message="done")
    compiled.backbone.save_pretrained(tmp_path / "mine", push_to_hub=True)
    assert [entry[:2] for entry in uploads] == [("me/deltas", "done"), ("me/mine", "Upload deltas")]
    assert all({"README.md", "manifest.json"} <= set(files) for _, _, files in uploads)


class Pipeline(nn.Sequential):
    """Saves its parts, as SentenceTransformer does."""

    def save_pretrained(self, path, safe_serialization=True):
        self[0].save_pretrained(path)

    def save(self, path, safe_serialization=True):
        self.save_pretrained(path)

    def forward(self, input_ids):
        return self[0](input_ids=input_ids).logits


def test_models_made_of_models_save_the_deltas_too(tmp_path):
    model = Pipeline(plain())
    ids = torch.arange(6)[None]
    spec = {"deltaspec": 1, "deltas": [{"name": "d", "method": "lora", "target": {"path": "**.query"}}]}
    compiled = deltaspec.compile(model, spec, example_inputs={"input_ids": ids})
    for parameter in compiled.deltas["d"].parameters():
        nn.init.normal_(parameter)
    compiled.backbone.save(tmp_path / "deltas", safe_serialization=True)
    back = deltaspec.restore(model, tmp_path / "deltas", example_inputs={"input_ids": ids})
    assert torch.equal(back(input_ids=ids), compiled(input_ids=ids))
    compiled.detach()
    compiled.backbone.save(tmp_path / "bare")
    assert (tmp_path / "bare" / "config.json").exists()
    assert "save" not in vars(compiled.merge("d"))
