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
# Small sizes, with dropout where a method has some.
PARAMS: dict[str, dict[str, Any]] = {
    "adalora": {"rank": 2, "initial_rank": 3, "dropout": 0.2},
    "adapter": {"width": 4, "dropout": 0.2},
    "boft": {"block_size": 4},
    "c3a": {"block_size": 4},
    "compacter": {"width": 4, "divisions": 2},
    "fourierft": {"frequencies": 20},
    "full": {"tied": "together"},
    "hira": {"rank": 2},
    "hra": {"rank": 2},
    "loha": {"rank": 2},
    "lokr": {"rank": 2},
    "lora": {"rank": 2, "dropout": 0.2},
    "low_rank_adapter": {"width": 4},
    "miss": {"rank": 2, "dropout": 0.2},
    "oft": {"block_size": 4},
    "p_tuning": {"tokens": 2, "width": 4},
    "parallel_adapter": {"width": 4},
    "prefix": {"tokens": 2},
    "reft": {"rank": 2},
    "road": {"group_size": 4},
    "soft_prompt": {"tokens": 2},
    "trainable_tokens": {"token_ids": [5, 9, 17]},
    "vera": {"rank": 4, "dropout": 0.2},
}


@cache
def base(architecture: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return BUILDERS[architecture]().eval().to(dtype)
