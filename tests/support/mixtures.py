"""Small mixtures of transformers, whose experts are stacked parameters."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import (
    GptOssConfig,
    GptOssForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

IDS = torch.tensor([[5, 3, 9, 17, 4, 8], [1, 2, 30, 4, 22, 6]])
SIZES: dict[str, Any] = dict(
    vocab_size=40, hidden_size=16, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=4
)


def mixtral() -> nn.Module:
    return MixtralForCausalLM(MixtralConfig(**SIZES, intermediate_size=24, num_local_experts=4, num_experts_per_tok=2))


def qwen3_moe() -> nn.Module:
    return Qwen3MoeForCausalLM(
        Qwen3MoeConfig(**SIZES, intermediate_size=24, moe_intermediate_size=12, num_experts=4, num_experts_per_tok=2)
    )


def gpt_oss() -> nn.Module:
    return GptOssForCausalLM(
        GptOssConfig(**SIZES, intermediate_size=24, num_local_experts=4, num_experts_per_tok=2, sliding_window=8)
    )
