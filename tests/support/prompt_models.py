"""Small models of different build that take token ids, and ids for them."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertForMaskedLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    RobertaConfig,
    RobertaForMaskedLM,
    T5Config,
    T5ForConditionalGeneration,
)

COMMON: dict[str, Any] = {"vocab_size": 90, "pad_token_id": 0, "eos_token_id": 2, "bos_token_id": 1}
BASIC = COMMON | {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
WIDE = COMMON | {"d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "decoder_start_token_id": 2}
HEADS = {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64}


def gpt2() -> nn.Module:
    return GPT2LMHeadModel(GPT2Config(**COMMON, n_embd=32, n_layer=2, n_head=4, n_positions=64))


def llama() -> nn.Module:
    return LlamaForCausalLM(LlamaConfig(**BASIC, num_key_value_heads=2))


def gemma3() -> nn.Module:
    return Gemma3ForCausalLM(Gemma3TextConfig(**BASIC, num_key_value_heads=2, head_dim=8, sliding_window=6))


def opt() -> nn.Module:
    sizes = {"ffn_dim": 64, "max_position_embeddings": 64, "word_embed_proj_dim": 32}
    base = {key: value for key, value in BASIC.items() if key != "intermediate_size"}
    return OPTForCausalLM(OPTConfig(**base, **sizes))


def bert() -> nn.Module:
    return BertForMaskedLM(BertConfig(**BASIC, max_position_embeddings=64))


def roberta() -> nn.Module:
    return RobertaForMaskedLM(RobertaConfig(**BASIC, max_position_embeddings=64))


def t5() -> nn.Module:
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4, "decoder_start_token_id": 0}
    return T5ForConditionalGeneration(T5Config(**COMMON, **sizes))


def bart() -> nn.Module:
    return BartForConditionalGeneration(BartConfig(**WIDE, **HEADS, max_position_embeddings=64))


DECODERS = [gpt2, llama, gemma3, opt]


def build(make: Any) -> nn.Module:
    torch.manual_seed(0)
    return make().eval()


def tokens(rows: int = 2, length: int = 7) -> Tensor:
    torch.manual_seed(1)
    return torch.randint(3, 90, (rows, length))
