"""Adapters that differ in their values alone: the first is read, the others are found by their headers."""

from __future__ import annotations

import copy
import json
import os
import shutil
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from beside_peft import moved, reloaded, saved
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

import deltaspec
from deltaspec.formats.alike import AlikeSet
from deltaspec.formats.base import Base
from deltaspec.formats.opening import open_set

IDS = torch.tensor([[3, 1, 4, 1, 5]])
FILE = "adapter_model.safetensors"


@pytest.fixture(scope="module")
def llama() -> Any:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(**sizes, num_key_value_heads=1, vocab_size=30)).eval()


def config(kind: type = peft.LoraConfig, **options: Any) -> Any:
    return kind(**({"target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"} | options))


def logits(model: Any) -> Tensor:
    found: Tensor = model(input_ids=IDS).logits
    return found[:, -IDS.shape[1] :].detach()  # PEFT gives those of its prompt, too


CONFIGS = {
    "lora": config(r=4),
    "rslora, uneven": config(r=4, use_rslora=True, rank_pattern={"q_proj": 2}),
    "dora": config(r=4, use_dora=True),
    "ia3": config(peft.IA3Config, target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
    "loha": config(peft.LoHaConfig, r=4),
    "prompt": peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
    "with a head": config(r=4, modules_to_save=["lm_head"]),
    "vera": config(peft.VeraConfig, r=4),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_each_of_a_library_has_the_values_of_its_own_file(llama, name, tmp_path):
    expected = {}
    for seed in range(3):
        folder = saved(moved(llama, CONFIGS[name], seed), tmp_path / f"d{seed}")
        expected[folder.name] = logits(peft.PeftModel.from_pretrained(copy.deepcopy(llama), folder).eval())
    spec = {"deltaspec": 1, "deltas": [{"name": "own", "method": "bitfit", "target": {"role": "attn.o"}}]}
    c = deltaspec.compile(llama, spec)
    library = c.library(tmp_path, by="folder")
    for folder, wanted in expected.items():
        c.only(*(known for known in library.names if known.split("/")[0] == folder))
        torch.testing.assert_close(logits(c), wanted, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(expected["d0"], expected["d1"], atol=1e-4)


@pytest.fixture
def two(llama, tmp_path) -> tuple[Path, Path]:
    """Two adapters alike."""
    for seed in range(2):
        saved(moved(llama, CONFIGS["lora"], seed), tmp_path / f"d{seed}")
    return tmp_path / "d0", tmp_path / "d1"


def opened(llama, *folders: Path) -> list[Any]:
    base = Base(llama)
    return [open_set(folder, lambda: base) for folder in folders]


def test_the_second_is_not_read_until_it_is_needed(llama, two):
    first, second = opened(llama, *two)
    assert (isinstance(first, AlikeSet), isinstance(second, AlikeSet)) == (False, True)
    assert second.names == ["d1"]
    alone = opened(llama, two[1])[0]
    assert second.spec("d1") == alone.spec("d1")
    assert second.keys("d1") == alone.keys("d1")
    expected, found = alone.tensors("d1", []), second.tensors("d1", [])
    assert all(torch.equal(expected[key], value) for key, value in found.items())
    assert found.keys() == expected.keys()


def other_rank(folder: Path) -> None:
    data = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(data | {"lora_alpha": 99}))


def other_dtype(folder: Path) -> None:
    save_file({key: value.half() for key, value in load_file(folder / FILE).items()}, folder / FILE)


def one_more(folder: Path) -> None:
    save_file(load_file(folder / FILE) | {"surplus": torch.ones(2)}, folder / FILE)


@pytest.mark.parametrize("change", [other_rank, other_dtype])
def test_what_is_not_alike_is_read_by_itself(llama, two, change):
    change(two[1])
    _, second = opened(llama, *two)
    assert not isinstance(second, AlikeSet)


def test_a_key_too_many_is_refused_beside_adapters_without_it(llama, two):
    one_more(two[1])
    with pytest.raises(deltaspec.DeltaSpecError, match="DS543"):
        opened(llama, *two)


def test_what_was_left_out_for_its_values_is_looked_at_in_each(llama, tmp_path):
    # PEFT writes the base's own table beside an adapter of the embedding; one that differs from it counts.
    for seed in range(2):
        made = moved(llama, config(r=2, target_modules=["embed_tokens", "q_proj"]), seed)
        made.save_pretrained(tmp_path / f"d{seed}", save_embedding_layers=True)
    file = tmp_path / "d1" / FILE
    tensors = load_file(file)
    (table,) = (key for key in tensors if key.endswith("embed_tokens.base_layer.weight"))
    save_file(tensors | {table: tensors[table] + 1.0}, file, {"format": "pt"})
    first, second = opened(llama, tmp_path / "d0", tmp_path / "d1")
    assert len(second.names) == len(first.names) + 1


def test_values_that_are_not_finite_are_found_when_they_are_loaded(llama, two):
    tensors = load_file(two[1] / FILE)
    next(iter(tensors.values()))[0, 0] = torch.nan
    save_file(tensors, two[1] / FILE, {"format": "pt"})
    c = deltaspec.compile(llama, {"deltaspec": 1, "deltas": [{"name": "o", "method": "lora", "target": "lm_head"}]})
    library = c.library(two[0].parent, by="folder").load("d0")
    with pytest.raises(deltaspec.DeltaSpecError, match="DS5"):
        library.load("d1")
    assert library.loaded == ("d0",)


def test_refresh_takes_in_an_adapter_that_was_written_again(llama, two):
    c = deltaspec.compile(llama, {"deltaspec": 1, "deltas": [{"name": "o", "method": "lora", "target": "lm_head"}]})
    library = c.library(two[0].parent, by="folder")
    for folder in two:  # one that was read, and one that is alike
        c.only(folder.name)
        before = logits(c)
        c.only()
        made = moved(llama, CONFIGS["lora"], seed=7)
        shutil.rmtree(folder)
        saved(made, folder)
        os.utime(folder / FILE, ns=(1, 1))  # another time, whatever the clock's grain
        library.refresh()
        c.only(folder.name)
        assert not torch.allclose(logits(c), before, atol=1e-4)
        torch.testing.assert_close(logits(c), logits(reloaded(llama, folder)), atol=1e-5, rtol=1e-5)
        c.only()
