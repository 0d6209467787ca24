"""Biases written as PEFT writes them: all of the base's, also those that no delta changes, under PEFT's names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from as_peft import same_in_peft, stirred
from beside_peft import moved, saved
from peft_bases import base, run
from safetensors.torch import load_file

import deltaspec

HEAD = {"name": "h", "method": "full", "target": "classifier"}
SOME = {"name": "b", "method": "bitfit", "target": {"role": "attn.q"}}


def written(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter_model.safetensors")


@pytest.mark.parametrize(
    "config",
    [
        peft.LoraConfig(target_modules=["query"], r=2, bias="all", modules_to_save=["classifier"]),
        peft.LoraConfig(target_modules=["query", "classifier"], r=2, bias="all", use_dora=True),
        peft.IA3Config(target_modules=["query"], feedforward_modules=[], modules_to_save=["pooler"]),
        peft.OFTConfig(target_modules=["query"], oft_block_size=4, bias="all", modules_to_save=["output.dense"]),
    ],
    ids=lambda config: f"{config.peft_type.value}-{'-'.join(config.modules_to_save or ())}",
)
def test_keys_are_peft_s(config: Any, tmp_path: Path) -> None:
    source = saved(moved(base("bert"), config), tmp_path / "in")
    same_in_peft(deltaspec.restore(base("bert"), source), base("bert"), tmp_path / "out", run("bert"))
    before, after = written(source), written(tmp_path / "out")
    assert before.keys() == after.keys()
    for key, value in before.items():
        torch.testing.assert_close(after[key], value, atol=1e-6, rtol=1e-6)


def test_a_bias_in_a_module_that_is_saved_whole_needs_no_option(tmp_path: Path) -> None:
    scales = {"name": "i", "method": "ia3", "target": {"role": "attn.q"}, "params": {}}
    shift = {"name": "b", "method": "bitfit", "target": "classifier"}
    same_in_peft(stirred(base("bert"), scales, HEAD, shift), base("bert"), tmp_path, run("bert"))
    assert not [key for key in written(tmp_path) if key.endswith("query.bias")]


@pytest.mark.parametrize("beside", [[], [HEAD], [{"name": "l", "method": "lora", "target": {"role": "attn.v"}}]])
def test_those_that_no_delta_changes_are_the_base_s(beside: list[Any], tmp_path: Path) -> None:
    model = base("bert")
    same_in_peft(stirred(model, SOME, *beside), model, tmp_path, run("bert"))
    found = written(tmp_path)
    layer = "bert.encoder.layer.0."
    for name in ("attention.self.key.bias", "output.LayerNorm.bias"):
        assert torch.equal(found[f"base_model.model.{layer}{name}"], model.get_parameter(layer + name))
    biases = {name for name, _ in model.named_parameters() if name.endswith(".bias")}
    assert len([key for key in found if key.endswith(".bias")]) == len(biases) + 2 * (beside == [HEAD])
