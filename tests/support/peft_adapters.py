"""PEFT directories on a tiny Llama, as PEFT writes them, and damaged copies of one of them."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from peft import IA3Config, LoraConfig, PeftConfig, PrefixTuningConfig, get_peft_model
from safetensors.torch import load_file, save_file
from tiny_models import llama
from torch import Tensor, nn

TARGETS = ["q_proj", "v_proj", "up_proj"]
KINDS: dict[str, Mapping[str, Any]] = {
    "plain": {},
    "all-linear": {"target_modules": "all-linear"},
    "regex": {"target_modules": r".*\.(q|v)_proj"},
    "rslora": {"use_rslora": True},
    "ranks": {"rank_pattern": {"q_proj": 4}, "alpha_pattern": {"q_proj": 8}},
    "alphas": {"alpha_pattern": {"v_proj": 3}},
    "rank 5": {"r": 5},
    "rank 32": {"r": 32},
    "rank 600": {"r": 600},
    "one layer": {"layers_to_transform": [1]},
    "dora": {"use_dora": True},
    "lora bias": {"lora_bias": True},
    "bias": {"bias": "all"},
    "head": {"target_modules": ["lm_head", "embed_tokens"]},
    "saved head": {"modules_to_save": ["lm_head"]},
    "pissa": {"init_lora_weights": "pissa"},
    "gaussian": {"init_lora_weights": "gaussian"},
    "tokens": {"trainable_token_indices": [1, 2]},
    "alora": {"alora_invocation_tokens": [3, 4], "task_type": "CAUSAL_LM"},
}
"""Options of LoRA by what they are called here."""
Change = Callable[[str, Tensor], Mapping[str, Tensor]]


def config(kind: str) -> PeftConfig:
    if kind == "ia3":
        return IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"])
    if kind == "prefix":
        return PrefixTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM")
    return LoraConfig(**{"r": 8, "lora_alpha": 16, "target_modules": TARGETS, **KINDS[kind]})


def base() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return llama().eval()


def write(folder: Path, kind: str = "plain") -> Path:
    """Have PEFT write an adapter of this kind, its tensors moved off their start."""
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.simplefilter("ignore")
        torch.manual_seed(1)
        model = get_peft_model(base(), config(kind))
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn(parameter.shape) * 0.2)
        model.save_pretrained(folder)
    return folder


def damaged(
    folder: Path,
    settings: Mapping[str, Any] | None = None,
    change: Change | None = None,
    without: tuple[str, ...] = (),
    ending: str = "safetensors",
) -> Path:
    """Have PEFT write a plain adapter, and change its configuration and its tensors."""
    write(folder)
    path = folder / "adapter_config.json"
    data = json.loads(path.read_text()) | dict(settings or {})
    path.write_text(json.dumps({key: value for key, value in data.items() if key not in without}))
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    file.unlink()
    changed: dict[str, Tensor] = {}
    for key, value in tensors.items():
        changed |= {key: value} if change is None else change(key, value)
    changed = {key: value.contiguous().clone() for key, value in changed.items()}
    if ending == "safetensors":
        save_file(changed, file)
    else:
        torch.save(changed, folder / f"adapter_model.{ending}")
    return folder


def renamed(old: str, new: str, where: str = "") -> Change:
    """Put one part of each key in another's place, in keys that hold `where`."""
    return lambda key, value: {key.replace(old, new) if where in key else key: value}


def left_out(part: str) -> Change:
    return lambda key, value: {} if part in key else {key: value}


DAMAGES: dict[str, Mapping[str, Any]] = {
    "another type": {"settings": {"peft_type": "IA3"}},
    "bin": {"ending": "bin"},
    "no prefix": {"change": renamed("base_model.model.", "")},
    "wrong path": {"change": renamed("model.model.layers", "model.transformer.h")},
    "wrapped": {"change": renamed("model.model.layers", "model._orig_mod.model.layers")},
    "unknown module": {"change": renamed("up_proj", "nope_proj", "layers.1.")},
    "layer 7": {"change": renamed("layers.1.", "layers.7.")},
    "odd key": {"change": renamed("lora_A.weight", "lora_C.weight", "layers.1.mlp.up_proj")},
    "default keys": {"change": renamed(".weight", ".default.weight")},
    "short lora_B": {"change": lambda k, v: {k: v[:-1] if "layers.0.self_attn.q_proj.lora_B" in k else v}},
    "narrow lora_A": {"change": lambda k, v: {k: v[:, :-1] if "layers.0.self_attn.q_proj.lora_A" in k else v}},
    "wrong targets": {"settings": {"target_modules": ["q_proj"]}},
    "no r": {"without": ("r",)},
    "no type": {"without": ("peft_type",)},
    "another r": {"settings": {"r": 4}},
    "one factor": {"change": left_out("layers.1.mlp.up_proj.lora_B")},
    "empty": {"change": left_out("")},
    "new key": {"settings": {"use_something_new": True}},
    "float64": {"change": lambda k, v: {k: v.double()}},
}
"""What was changed, as arguments of `damaged`."""
