"""Folders in which transformers keeps stacked experts one by one, under names of its own, are merged and compared."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from moved import moved
from safetensors.torch import load_file, save_file
from transformers import MixtralConfig, MixtralForCausalLM

import deltaspec
from deltaspec.diagnostics.findings import DeltaSpecError
from deltaspec.folders import extract, merge_folder
from deltaspec.folders.pieces import pieces

EXPERTS = "model.layers.*.mlp.experts."
DELTAS = [
    {"name": "attention", "method": "lora"},
    {"name": "down", "method": "lora", "target": {"parameter": f"{EXPERTS}down_proj"}},
    {"name": "up", "method": "lora", "target": {"parameter": f"{EXPERTS}gate_up_proj", "layers": {"last": 1}}},
]


@pytest.fixture
def base(tmp_path: Path) -> Any:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2}
    experts = {"num_local_experts": 3, "num_key_value_heads": 1, "vocab_size": 32}
    model = MixtralForCausalLM(MixtralConfig(**sizes, **experts)).bfloat16()
    model.save_pretrained(tmp_path / "base", max_shard_size="6KB")
    return model.eval()


def read(folder: Path) -> dict[str, torch.Tensor]:
    return MixtralForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).state_dict()


def equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(value, other[key]) for key, value in one.items())


def test_experts_are_merged_as_in_memory_and_taken_out_again(base: Any, tmp_path: Path) -> None:
    compiled = moved(deltaspec.compile(base, {"deltaspec": 1, "deltas": DELTAS}), 1)
    compiled.save(tmp_path / "deltas")
    changed = merge_folder(tmp_path / "deltas", tmp_path / "base", tmp_path / "merged")
    merged = read(tmp_path / "merged")
    assert equal(merged, compiled.merge().state_dict())
    assert sum(".experts." in key for key in changed) == 3 * (1 + 1 + 2)  # w2 in both layers, w1 and w3 in one
    found = extract(tmp_path / "merged", tmp_path / "base", tmp_path / "extracted", error=0)
    assert {change.fqn for change in found.changes if ".experts." in change.fqn} == {
        "model.layers.0.mlp.experts.down_proj",
        "model.layers.1.mlp.experts.down_proj",
        "model.layers.1.mlp.experts.gate_up_proj",
    }
    again = deltaspec.restore(base, tmp_path / "extracted").merge().state_dict()
    assert all(torch.equal(again[key], value) for key, value in merged.items() if ".experts." in key)


def test_pieces_are_made_once(base: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    moved(deltaspec.compile(base, {"deltaspec": 1, "deltas": DELTAS[1:2]}), 1).save(tmp_path / "deltas")
    made: list[str] = []

    def counting(model: Any, name: str, value: torch.Tensor) -> dict[str, torch.Tensor]:
        made.extend([name] * (value.device.type != "meta"))
        return pieces(model, name, value)

    monkeypatch.setattr("deltaspec.folders.weights.pieces", counting)
    merge_folder(tmp_path / "deltas", tmp_path / "base", tmp_path / "merged")
    assert sorted(made) == [f"model.layers.{layer}.mlp.experts.down_proj" for layer in (0, 1)]


@pytest.mark.parametrize("damage", [None, lambda value: value.t().contiguous(), lambda value: value[:1].clone()])
def test_a_folder_that_lacks_an_expert_or_has_one_of_another_shape_is_refused(
    base: Any, damage: Any, tmp_path: Path
) -> None:
    moved(deltaspec.compile(base, {"deltaspec": 1, "deltas": DELTAS}), 1).save(tmp_path / "deltas")
    base.save_pretrained(tmp_path / "cut")
    file = tmp_path / "cut" / "model.safetensors"
    tensors = load_file(file)
    expert = tensors.pop("model.layers.0.block_sparse_moe.experts.1.w2.weight")
    if damage is not None:
        tensors["model.layers.0.block_sparse_moe.experts.1.w2.weight"] = damage(expert)
    save_file(tensors, file)
    with pytest.raises(DeltaSpecError, match=r"no tensor model.layers.0.mlp.experts.down_proj here"):
        merge_folder(tmp_path / "deltas", tmp_path / "cut", tmp_path / "out")
    assert not (tmp_path / "out").exists()
