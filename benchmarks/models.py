"""The models that are measured, and a spec and a PEFT configuration for each that say the same."""

from __future__ import annotations

import copy
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

GPT2_LINEAR = ["c_attn", "c_proj", "c_fc"]
LLAMA_LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "gate_proj", "down_proj"]


def gpt2() -> GPT2LMHeadModel:
    """Build twelve layers, 256 wide: 48 linear layers."""
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(n_embd=256, n_layer=12, n_head=4)).eval()


def llama(width: int = 512, inner: int = 1376, layers: int = 8, heads: int = 8) -> LlamaForCausalLM:
    """Build a Llama; by default eight layers, 512 wide: 56 linear layers."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        vocab_size=1000,
    )
    return LlamaForCausalLM(config).eval()


def spec(names: list[str], linear: list[str], dropout: float = 0.0) -> dict[str, Any]:
    """Write a spec with LoRA of rank 8 on all linear layers, one delta a name."""
    target = {"path": [f"**.{name}" for name in linear]}
    params = {"rank": 8, "alpha": 16, "dropout": dropout}
    deltas = [{"name": n, "method": "lora", "params": params, "target": target} for n in names]
    for delta in deltas[1:]:
        delta["attached"] = False
    return {"deltaspec": 1, "deltas": deltas}


def config(linear: list[str], dropout: float = 0.0) -> LoraConfig:
    """Say the same to PEFT."""
    turned = "c_attn" in linear
    return LoraConfig(r=8, lora_alpha=16, target_modules=list(linear), lora_dropout=dropout, fan_in_fan_out=turned)


def peft(model: nn.Module, names: list[str], linear: list[str], dropout: float = 0.0) -> PeftModel:
    """Wrap a copy of the model with one adapter a name."""
    wrapped = get_peft_model(copy.deepcopy(model), config(linear, dropout), adapter_name=names[0])
    for name in names[1:]:
        wrapped.add_adapter(name, config(linear))
    wrapped.set_adapter(names[0])
    wrapped.eval()
    return wrapped
