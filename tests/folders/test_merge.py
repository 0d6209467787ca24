"""Merging shard by shard gives, to the bit, what merging in memory gives."""

from __future__ import annotations

import json

import pytest
import torch
from moved import moved
from safetensors.torch import load_file, save_file
from tiny_models import base

import deltaspec
from deltaspec.diagnostics.findings import DeltaSpecError
from deltaspec.folders import merge_folder
from deltaspec.folders.weights import Folder

LORA = {"name": "low", "method": "lora", "params": {"rank": 2}}
CASES = {
    "llama": [LORA, {"name": "norms", "method": "norm"}],
    "llama-bf16": [LORA | {"params": {"rank": 2, "use_dora": True}}],
    "gpt2": [LORA, {"name": "biases", "method": "bitfit", "target": {"type": "Conv1D"}}],
    "gpt2-tied": [{"name": "rows", "method": "trainable_tokens", "params": {"token_ids": [4, 7]}}],
    "gpt2-head": [LORA | {"target": "lm_head"}],
    "gpt2-table": [LORA | {"target": "transformer.wte"}, {"name": "q", "method": "lora"}],
    "t5-head": [LORA | {"target": "lm_head"}],
    "t5": [{"name": "all", "method": "full", "params": {"tied": "together"}, "target": "shared"}, LORA],
    "bert": [LORA, {"name": "oft", "method": "oft", "params": {"block_size": 4}, "attached": False}],
}  # fmt: skip


def made(case):
    kind, _, way = case.partition("-")
    return base(kind, torch.bfloat16 if way == "bf16" else torch.float32)


def saved(case, folder, strength=None):
    compiled = moved(deltaspec.compile(made(case), {"deltaspec": 1, "deltas": CASES[case]}))
    if strength is not None:
        compiled.only(dict.fromkeys(compiled.attached, strength))
    compiled.save(folder)
    return compiled


def state(folder):
    return dict(part for file in folder.glob("*.safetensors") for part in load_file(file).items())


@pytest.fixture(params=CASES)
def case(request):
    return request.param


@pytest.mark.parametrize("shards", ["8KB", "1GB"])
def test_the_folder_has_the_bits_of_a_merge_in_memory(case, shards, tmp_path):
    compiled = saved(case, tmp_path / "deltas", 0.5 if case == "llama" else None)
    made(case).save_pretrained(tmp_path / "base", max_shard_size=shards)
    (tmp_path / "base/tokenizer.json").write_text("{}")
    before = {path.name: path.read_bytes() for path in (tmp_path / "base").iterdir()}
    changed = merge_folder(tmp_path / "deltas", tmp_path / "base", tmp_path / "out")
    assert before == {path.name: path.read_bytes() for path in (tmp_path / "base").iterdir()}
    expected = compiled.merge()
    expected.save_pretrained(tmp_path / "expected")
    ours, theirs = state(tmp_path / "out"), state(tmp_path / "expected")
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in theirs)
    plain = state(tmp_path / "base")
    assert set(changed) == {k for k, v in ours.items() if k not in plain or not torch.equal(v, plain[k])}
    back = type(made(case)).from_pretrained(tmp_path / "out")
    loaded, merged = back.state_dict(), expected.state_dict()
    assert loaded.keys() == merged.keys() and all(torch.equal(loaded[name], merged[name]) for name in merged)
    config, theirs_config = (json.loads((tmp_path / f / "config.json").read_text()) for f in ("out", "expected"))
    assert config.get("tie_word_embeddings") == theirs_config.get("tie_word_embeddings")
    assert (tmp_path / "out/tokenizer.json").read_text() == "{}"
    if shards == "8KB":
        index = json.loads((tmp_path / "out/model.safetensors.index.json").read_text())
        assert len(Folder(tmp_path / "out").files) >= 2 and index["weight_map"].keys() == ours.keys()


def test_folders_without_or_with_the_prefix_of_the_base_are_read(tmp_path):
    compiled = saved("gpt2", tmp_path / "deltas")
    made("gpt2").transformer.save_pretrained(tmp_path / "base")
    config = json.loads((tmp_path / "base/config.json").read_text())
    (tmp_path / "base/config.json").write_text(json.dumps(config | {"architectures": ["GPT2LMHeadModel"]}))
    merge_folder(tmp_path / "deltas", tmp_path / "base", tmp_path / "out")
    ours, theirs = state(tmp_path / "out"), compiled.merge().transformer.state_dict()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in theirs)


def test_an_untied_head_is_named_as_its_neighbours(tmp_path):
    saved("gpt2-head", tmp_path / "deltas")
    made("gpt2").transformer.save_pretrained(tmp_path / "base")
    config = json.loads((tmp_path / "base/config.json").read_text())
    (tmp_path / "base/config.json").write_text(json.dumps(config | {"architectures": ["GPT2LMHeadModel"]}))
    assert merge_folder(tmp_path / "deltas", tmp_path / "base", tmp_path / "out") == ("lm_head.weight",)


def test_plain_modules_need_a_model_and_no_configuration(tmp_path):
    model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.BatchNorm1d(3)).eval()
    spec = {
        "deltaspec": 1,
        "deltas": [{"name": "all", "method": "full", "target": {"type": ["Linear", "BatchNorm1d"]}}],
    }
    compiled = moved(deltaspec.compile(model, spec))
    compiled.save(tmp_path / "deltas")
    (tmp_path / "base").mkdir()
    save_file(model.state_dict(), tmp_path / "base/model.safetensors")
    merge_folder(tmp_path / "deltas", tmp_path / "base", tmp_path / "out", model=model)
    ours, theirs = state(tmp_path / "out"), compiled.merge().state_dict()
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


def codes(raised):
    return sorted({finding.code for finding in raised.value.diagnostics})


@pytest.mark.parametrize(
    ("damage", "code"),
    [("truncated", "DS554"), ("pickle", "DS554"), ("index", "DS554"), ("lacking", "DS555"), ("other", "DS523"),
     ("codes", "DS555"), ("adapter", "DS435"), ("there", "DS558"), ("nothing", "DS417"), ("inf", "DS520")],
)  # fmt: skip
def test_what_cannot_be_merged_is_refused_and_nothing_is_written(tmp_path, damage, code):
    deltas = [LORA, {"name": "wide", "method": "adapter", "params": {"width": 2}, "target": {"role": "block"}}]
    compiled = moved(deltaspec.compile(base("llama"), {"deltaspec": 1, "deltas": deltas}))
    compiled.only(*{"adapter": ("low", "wide"), "nothing": ()}.get(damage, ("low",)))
    compiled.save(tmp_path / "deltas")
    base("llama").save_pretrained(tmp_path / "base")
    file = tmp_path / "base/model.safetensors"
    tensors, q = load_file(file), "model.layers.0.self_attn.q_proj.weight"
    if damage == "truncated":
        file.write_bytes(file.read_bytes()[:-10])
    elif damage == "pickle":
        file.rename(tmp_path / "base/pytorch_model.bin")
    elif damage == "index":
        file.rename(tmp_path / "base/a.safetensors")
        index = {"weight_map": {q: "a.safetensors", "more": "../b.safetensors"}}
        (tmp_path / "base/model.safetensors.index.json").write_text(json.dumps(index))
    elif damage == "there":
        (tmp_path / "out").mkdir()
        (tmp_path / "out/mine.txt").write_text("mine")
    elif damage in ("lacking", "other", "codes", "inf"):
        value = {"other": tensors[q] + 1, "codes": tensors[q].to(torch.float8_e4m3fn), "inf": tensors[q].half()}.get(
            damage
        )
        tensors.pop(q)
        if value is not None:
            tensors[q] = value
        save_file(tensors, file, {"format": "pt"})
    if damage == "inf":
        with torch.no_grad():
            compiled.deltas["low"].tensor(q.replace("weight", "up")).fill_(1e6)
        compiled.save(tmp_path / "deltas")
    with pytest.raises(DeltaSpecError) as raised:
        merge_folder(
            tmp_path / "deltas", tmp_path / "base", tmp_path / "out", match="sites" if damage == "codes" else "weights"
        )
    assert code in codes(raised)
    assert [path.name for path in tmp_path.glob("**/*") if "out" in path.parts[-1] and damage != "there"] == []
