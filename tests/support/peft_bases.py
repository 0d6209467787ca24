"""Base models for adapters that PEFT makes, and how they are run: transformers, convolutions, attention."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    GptOssConfig,
    GptOssForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

IDS = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6]])
_LLAMA: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
                          "num_key_value_heads": 1, "vocab_size": 30}  # fmt: skip


class Convolutions(nn.Module):
    """Convolutions over one, two and three axes, strided, padded, grouped; norms with and without statistics."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.grouped = nn.Conv2d(4, 8, 3, stride=2, padding=1), nn.Conv2d(8, 8, 3, groups=2, padding=1)
        self.dilated = nn.Conv2d(8, 8, 3, dilation=2, padding=2)
        self.conv1, self.conv3, self.fc = nn.Conv1d(8, 12, 3, padding=1), nn.Conv3d(1, 4, 2), nn.Linear(12, 8)
        self.bn, self.ln = nn.BatchNorm2d(8), nn.LayerNorm(12)

    def forward(self, x: Tensor) -> Tensor:
        h = self.grouped(torch.tanh(self.dilated(self.bn(torch.tanh(self.conv(x)))))).flatten(2)
        out: Tensor = self.fc(self.ln(self.conv1(h).transpose(1, 2))) + self.conv3(x[:, None, :, :6, :6]).mean()
        return out


class Attention(nn.Module):
    """Packed attention, whose `out_proj` nothing calls, and a layer whose matrix is no Linear's."""

    def __init__(self) -> None:
        super().__init__()
        self.mha, self.fc, self.free = nn.MultiheadAttention(8, 2, batch_first=True), nn.Linear(8, 8), Free()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.free(self.fc(self.mha(x, x, x)[0]))
        return out


class Free(nn.Module):
    """x @ weight: the matrix is `[in, out]`, and nothing says so."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8, 6))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight


MODELS: dict[str, Callable[[], nn.Module]] = {
    "convolutions": Convolutions,
    "attention": Attention,
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**_LLAMA)),
    "tied": lambda: LlamaForCausalLM(LlamaConfig(**_LLAMA, tie_word_embeddings=True)),
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=30, n_positions=16)),
    "bert": lambda: BertForSequenceClassification(
        BertConfig(**{k: v for k, v in _LLAMA.items() if k != "num_key_value_heads"}, initializer_range=0.2)
    ),
    "t5": lambda: T5ForConditionalGeneration(T5Config(d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2,
                                                      vocab_size=30, decoder_start_token_id=0)),
    "mixtral": lambda: MixtralForCausalLM(MixtralConfig(**_LLAMA, num_local_experts=3)),
    "gptoss": lambda: GptOssForCausalLM(GptOssConfig(**_LLAMA, head_dim=8, num_local_experts=3, num_experts_per_tok=2)),
}  # fmt: skip


@cache
def base(name: str) -> nn.Module:
    """Return a base model; nothing writes to it. Biases are not zero, which would hide a lost one."""
    torch.manual_seed(0)
    model = MODELS[name]().eval()
    with torch.no_grad():
        for parameter, value in model.named_parameters():
            if parameter.endswith("bias"):
                value.normal_(std=0.1)
    return model


def run(name: str) -> Callable[[Any], Tensor]:
    """Return what runs a model of this name: logits, or what a plain module gives."""
    seeded = torch.Generator().manual_seed(5)
    if name == "convolutions":
        images = torch.randn(2, 4, 9, 9, generator=seeded)
        return lambda model: model(images)
    if name == "attention":
        states = torch.randn(2, 5, 8, generator=seeded)
        return lambda model: model(states)
    more = {"decoder_input_ids": IDS} if name == "t5" else {}
    return lambda model: model(input_ids=IDS, **more).logits
