"""PEFT adapters whose files were cut or changed: one error, whatever was done to them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from beside_peft import moved, saved
from peft_bases import base
from safetensors.torch import load_file, save_file
from torch import Tensor

import deltaspec

QV = {"target_modules": ["q_proj", "v_proj"]}
CONV = {"target_modules": ["conv", "conv1"], "use_effective_conv2d": True}
FILE = "adapter_model.safetensors"


def damaged(tensors: dict[str, Tensor]) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """Yield a file without a tensor, with a renamed one, and with one of other shapes; one of each ending."""
    endings = {key.replace(".weight", "_weight").rpartition(".")[2]: key for key in sorted(tensors)}
    for key in endings.values():
        value = tensors[key]
        rest = {name: other for name, other in tensors.items() if name != key}
        if not key.endswith("w_norm"):  # which follows from the base, as in PEFT
            yield f"without {key}", rest
        yield f"{key} renamed", {**rest, f"{key}x": value}
        yield f"{key} of one number", {**rest, key: torch.zeros(())}
        yield f"{key} with a dimension more", {**rest, key: value[None]}
        for axis, size in enumerate(value.shape):
            if size > 1:
                yield f"{key} cut", {**rest, key: value.narrow(axis, 0, size - 1).contiguous()}


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("llama", peft.AdaLoraConfig(**QV, total_step=10, init_r=4, target_r=2)),
        ("llama", peft.LoKrConfig(**QV, r=1)),
        ("llama", peft.OFTConfig(**QV, oft_block_size=4)),
        ("llama", peft.BOFTConfig(**QV, boft_block_size=4)),
        ("llama", peft.IA3Config()),
        ("llama", peft.VeraConfig(**QV, r=3)),
        ("llama", peft.FourierFTConfig(**QV, n_frequency=10)),
        ("llama", peft.HRAConfig(**QV, r=2)),
        ("llama", peft.HiraConfig(**QV, r=2)),
        ("llama", peft.RoadConfig(**QV, group_size=4)),
        ("llama", peft.C3AConfig(**QV, block_size=4)),
        ("llama", peft.MissConfig(**QV, r=2)),
        ("llama", peft.DeloraConfig(**QV, r=2)),
        ("llama", peft.TrainableTokensConfig(token_indices=[1, 3])),
        ("mixtral", peft.LoraConfig(target_modules=[], target_parameters=["experts.gate_up_proj"], r=2)),
        ("attention", peft.LoraConfig(target_modules=["mha"], r=2)),
        ("convolutions", peft.LoKrConfig(**CONV, r=1)),
        ("convolutions", peft.LoHaConfig(**CONV, r=2)),
        ("convolutions", peft.LNTuningConfig(target_modules=["bn"])),
    ],
    ids=lambda given: given if isinstance(given, str) else given.peft_type.value,
)
def test_each_damage_is_an_error(name: str, config: Any, tmp_path: Path) -> None:
    folder = saved(moved(base(name), config), tmp_path)
    for what, tensors in damaged(load_file(folder / FILE)):
        save_file(tensors, folder / FILE)
        with pytest.raises(deltaspec.DeltaSpecError):
            deltaspec.restore(base(name), folder)
            pytest.fail(what)


def test_a_configuration_of_another_adapter(tmp_path: Path) -> None:
    folder = saved(moved(base("llama"), peft.LoKrConfig(**QV, r=1)), tmp_path)
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "r": 2}))
    with pytest.raises(deltaspec.DeltaSpecError, match="lokr has none with these parameters"):
        deltaspec.restore(base("llama"), folder)
