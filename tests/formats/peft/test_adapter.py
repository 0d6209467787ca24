"""PEFT adapters whose files were cut or changed: one error, whatever was done to them."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from beside_peft import moved, saved
from peft_bases import IDS, base
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


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("llama", peft.LoraConfig(**QV, use_dora=True, r=2)),
        ("llama", peft.LoraConfig(**QV, r=2, trainable_token_indices=[1, 2], modules_to_save=["lm_head"])),
        ("llama", peft.LoraConfig(target_modules=["embed_tokens"], r=2)),
        ("llama", peft.FourierFTConfig(**QV, n_frequency=9)),
        ("bert", peft.IA3Config(target_modules=["query"], feedforward_modules=[], task_type="SEQ_CLS")),
    ],
    ids=["dora", "rows", "embedding", "fourierft", "ia3"],
)
@pytest.mark.parametrize("whole", [False, True], ids=["adapter", "whole"])
def test_a_state_as_the_model_has_it(name: str, config: Any, whole: bool, tmp_path: Path) -> None:
    # As DeepSpeed and FSDP gather it: with the adapter's name in each key, and all of the base beside it.
    made = moved(base(name), config)
    folder = saved(made, tmp_path / "french")
    state = {key: value.detach().clone() for key, value in made.state_dict().items()}
    trained = {key for key, parameter in made.named_parameters() if parameter.requires_grad}
    save_file({key: value for key, value in state.items() if whole or key in trained}, folder / FILE)
    assert (made(IDS).logits - deltaspec.restore(base(name), folder)(IDS).logits).abs().max() < 1e-5


def test_ranks_that_two_patterns_say_and_saving_sorted(tmp_path: Path) -> None:
    # PEFT goes by the first key in training, sorts keys when it saves, and cannot read its own file then.
    ranks = {"q_proj": 3, r".*\.1\..*": 5}
    folder = saved(moved(base("llama"), peft.LoraConfig(**QV, r=2, rank_pattern=ranks)), tmp_path / "french")
    with pytest.raises(deltaspec.DeltaSpecError) as error:
        deltaspec.restore(base("llama"), folder)
    (finding,) = error.value.diagnostics
    assert "model.layers.1.self_attn.q_proj: its rank is 5, and lora_A is [3, 16], where 5 rows are due" in str(finding)
    assert "and 'q_proj' of rank_pattern mean it, and PEFT sorts them" in str(finding)
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, "rank_pattern": ranks}))
    assert deltaspec.restore(base("llama"), folder).attached == ("french",)


def test_biases_of_modules_that_have_none_here_or_others(tmp_path: Path) -> None:
    options = {"boft_block_size": 4, "bias": "boft_only"}
    made = moved(base("bert"), peft.BOFTConfig(target_modules=["query"], **options))
    folder = saved(made, tmp_path / "french")
    bare = copy.deepcopy(base("bert"))
    for layer in bare.bert.encoder.layer:
        layer.attention.self.query.bias = None
    with pytest.raises(deltaspec.DeltaSpecError, match=r"DS543. holds .*query.*bias, which fit nowhere"):
        deltaspec.restore(bare, folder)
    tensors = load_file(folder / FILE)
    save_file({k: v[:3].clone() if k.endswith("bias") else v for k, v in tensors.items()}, folder / FILE)
    with pytest.raises(deltaspec.DeltaSpecError, match=r"DS526. .*bias has the shape \[3\], where 16 is due"):
        deltaspec.restore(base("bert"), folder)
    dora = peft.LoraConfig(target_modules=["query"], use_dora=True, r=2, bias="lora_only")
    folder = saved(moved(base("bert"), dora), tmp_path / "german")
    tensors = load_file(folder / FILE)
    save_file({k: v[:3].clone() if k.endswith("bias") else v for k, v in tensors.items()}, folder / FILE)
    with pytest.raises(deltaspec.DeltaSpecError, match=r"DS526. bias of .*query is \[3\], and must be \[16\]"):
        deltaspec.restore(base("bert"), folder)
