"""Our saved deltas, judged as the adapters that an export to PEFT would make of them."""

from __future__ import annotations

import json
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
from moved import moved
from tiny_models import base
from torch import nn

import deltaspec
from deltaspec import engines
from deltaspec.diagnostics.findings import DeltaSpecError


def saved(folder: Path, *deltas: dict[str, Any], model: nn.Module | None = None) -> Path:
    model = base("llama") if model is None else model
    moved(deltaspec.compile(model, {"deltaspec": 1, "deltas": list(deltas)}), 1).save(folder)
    return folder


def lora(name: str = "french", role: Any = ("attn.q", "mlp.up"), **more: Any) -> dict[str, Any]:
    return {"name": name, "method": "lora", "target": {"role": list(role)}, **more}


def codes(folder: Path, engine: str, model: nn.Module | None = None) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for finding in engines.check(folder, base("llama") if model is None else model, engine):
        found.setdefault(finding.where, []).append(f"{finding.message.split()[1]} {finding.code}")
    return found


def test_a_plain_lora_passes_everywhere(tmp_path):
    saved(tmp_path, lora(params={"rank": 4}))
    assert {engine: codes(tmp_path, engine) for engine in engines.known()} == {engine: {} for engine in engines.known()}


def test_each_delta_is_judged_by_itself(tmp_path):
    saved(
        tmp_path,
        lora("start", ["attn.q"], params={"init": "pissa", "rank": 10}),
        lora("scaled", params={"scaling": "rslora"}),
        lora("uneven", overrides=[{"match": {"role": "mlp.up"}, "params": {"rank": 2}}]),
        lora("magnitudes", ["attn.o"], params={"use_dora": True}),
        {"name": "both", "from": {"uneven": 0.5}, "combine": "cat", "attached": False},
        {"name": "scales", "method": "ia3"},
        {"name": "bottleneck", "method": "adapter", "params": {"width": 4}},
        {"name": "head", "method": "full", "target": "lm_head"},
    )
    assert codes(tmp_path, "vllm") == {
        "magnitudes": ["rejected DS605"],
        "start": ["rejected DS602"],  # its start is subtracted as another ten ranks
        "head": ["rejected DS607"],
        **{name: ["rejected DS601"] for name in ("scales", "bottleneck")},
    }
    assert codes(tmp_path, "sglang") == {
        "scaled": ["wrong DS604"],
        "uneven": ["rejected DS603"],
        "magnitudes": ["rejected DS605"],
        "both": ["rejected DS603", "rejected DS603"],
        "head": ["ignored DS607"],
        **{name: ["rejected DS601"] for name in ("scales", "bottleneck")},
    }
    assert codes(tmp_path, "peft") == {"bottleneck": ["rejected DS601"]}


def test_the_way_out_is_one_that_the_method_has(tmp_path):
    low = {"name": "l", "method": "vera", "params": {"rank": 4}}
    saved(tmp_path, {"name": "a", "method": "adapter", "params": {"width": 4}}, {"name": "i", "method": "ia3"}, low)
    bottleneck, scales, low_rank = engines.check(tmp_path, base("llama"), "vllm")
    assert low_rank.suggestion == f"deltaspec export {tmp_path} --for vllm -o OUT writes it as a LoRA, exactly"
    assert "at model.layers.{0..1}.self_attn.o_proj, model.layers.{0..1}.mlp.down_proj:" in bottleneck.message
    assert "merge" not in bottleneck.suggestion
    assert f'deltaspec.restore(model, "{tmp_path}").merge()' in scales.suggestion


def test_biases_and_whole_modules_are_judged_as_peft_keeps_them(tmp_path):
    model = base("bert")
    top = [f"cls.predictions.transform.{name}" for name in ("dense", "LayerNorm")]
    saved(tmp_path, {"name": "b", "method": "bitfit"}, {"name": "h", "method": "full", "target": top}, model=model)
    assert codes(tmp_path, "vllm", model) == {"b": ["rejected DS606"], "h": ["rejected DS607"] * 2}
    assert codes(tmp_path, "peft", model) == {}


def test_parts_of_a_fused_projection_are_judged_over_its_whole_width(tmp_path):
    model = base("gpt2")
    saved(tmp_path, lora(role=["attn.qkv"], params={"parts": ["q", "v"], "rank": 6}), model=model)
    assert codes(tmp_path, "vllm", model) == {}
    (finding,) = engines.check(tmp_path, model, "vllm", max_rank=8)
    assert "rank 12 at transformer.h.{0..1}.attn.c_attn" in finding.message
    assert codes(tmp_path, "sglang", model) == {"french": ["rejected DS614"]}  # it knows no c_attn


def test_another_base_is_found_out(tmp_path):
    saved(tmp_path, lora(params={"rank": 4}))
    (finding,) = engines.check(tmp_path, base("short llama"), "vllm")
    assert finding.code == "DS616" and "model.layers.1" in finding.message
    (finding,) = engines.check(tmp_path, base("llama").model, "vllm")
    assert finding.code == "DS615"


@pytest.mark.parametrize(
    "content", ["", "{}", '{"deltas": {"french": []}}', '{"deltas": {"french": {"method": "lora"}}}']
)
def test_a_damaged_lock_is_one_finding(content, tmp_path):
    saved(tmp_path, lora())
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    (entry,) = manifest["deltas"]
    (tmp_path / entry["lock"]).write_text(content)
    for valid in (False, True):  # with the digest of before, and with that of the damaged file
        with pytest.raises(DeltaSpecError) as error:
            engines.check(tmp_path, base("llama"), "vllm")
        assert [finding.code for finding in error.value.diagnostics] == ["DS522"], valid
        entry["lock_sha256"] = sha256(content.encode()).hexdigest()
        (tmp_path / "manifest.json").write_text(json.dumps(manifest))
