"""Tiny transformers models of four families, made once, and the sizes at which each method fits them."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import nn
from transformers import (
    BertConfig,
    BertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from deltaspec.methods.registry import builtin_methods

COMMON: dict[str, Any] = {"vocab_size": 48, "pad_token_id": 0, "eos_token_id": 2, "bos_token_id": 1}
BASIC = COMMON | {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}


def gpt2() -> nn.Module:
    return GPT2LMHeadModel(GPT2Config(**COMMON, n_embd=16, n_layer=2, n_head=2, n_positions=32))


def llama(layers: int = 2) -> nn.Module:
    sizes = BASIC | {"num_hidden_layers": layers, "num_key_value_heads": 1, "attention_dropout": 0.1}
    return LlamaForCausalLM(LlamaConfig(**sizes))


def short_llama() -> nn.Module:
    """One layer, since torch.compile takes seconds a layer."""
    return llama(1)


def t5() -> nn.Module:
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2, "decoder_start_token_id": 0}
    return T5ForConditionalGeneration(T5Config(**COMMON, **sizes))


def bert() -> nn.Module:
    return BertForMaskedLM(BertConfig(**BASIC, max_position_embeddings=32))


ARCHITECTURES: dict[str, Callable[[], nn.Module]] = {"gpt2": gpt2, "llama": llama, "t5": t5, "bert": bert}
BUILDERS = ARCHITECTURES | {"short llama": short_llama}
PARAMS: dict[str, dict[str, Any]] = {
    name: {**method.small, **({"dropout": 0.2} if "dropout" in method.Params.model_fields else {})}
    for name, method in builtin_methods().items()
}
"""Small sizes, with dropout where a method has some."""
del PARAMS["p_tuning"]["dropout"]  # between layers of an LSTM, which its small bottleneck has not
TOKENS = PARAMS["trainable_tokens"]["token_ids"]


@cache
def base(architecture: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return BUILDERS[architecture]().eval().to(dtype)
