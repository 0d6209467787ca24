"""Small models of different build that many tests share, each with its inputs and the places to tune."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
)

from deltaspec.backbone.inputs import call_arguments

VOCABULARY = 90


@dataclass(frozen=True)
class Architecture:
    """A model to try things on."""

    name: str
    build: Callable[[], nn.Module]
    inputs: Callable[[], Any]
    """Makes the example inputs: a dict of keywords, or one tensor."""
    targets: tuple[Any, ...]
    """Where a method may go if its default roles are not here: tried in order."""
    capture: str = "modules"

    def model(self) -> nn.Module:
        """Build it, always with the same weights, in evaluation mode."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = self.build()
            for parameter in model.parameters():
                if parameter.dim() == 1:  # biases and norms that start at 0 or 1 hide mistakes
                    nn.init.normal_(parameter, mean=float(parameter.detach().mean()), std=0.05)
        return model.eval()


class Traceable(nn.Module):
    """Convolution, norms and linear layers, no control flow: torch.fx traces it."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.bn = nn.BatchNorm2d(8)
        self.up = nn.Linear(8, 24)
        self.norm = nn.LayerNorm(24)
        self.head = nn.Linear(24, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn(self.conv(x))).mean((2, 3))
        return self.head(F.gelu(self.norm(self.up(x))))


class Branching(nn.Module):
    """Looks at values, loops, and calls one module twice: torch.fx does not trace it."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, 16)
        self.block = nn.ModuleDict({"up": nn.Linear(16, 32), "down": nn.Linear(32, 16)})
        self.norm = nn.LayerNorm(16)
        self.rnn = nn.GRU(16, 16, batch_first=True)
        self.head = nn.Linear(16, 4)

    def forward(self, ids: Tensor) -> dict[str, Tensor]:
        hidden = self.embed(ids)
        for _ in range(2):
            change = self.block["down"](torch.tanh(self.block["up"](self.norm(hidden))))
            hidden = hidden + change if bool(change.sum() < 1e9) else hidden - change
        hidden, _ = self.rnn(hidden)
        return {"logits": self.head(hidden), "hidden": hidden}


def ids(rows: int = 2, length: int = 7) -> Tensor:
    """Make token ids, always the same."""
    return torch.randint(3, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(1))


def images() -> Tensor:
    """Make two images, always the same."""
    return torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def bert() -> nn.Module:
    return BertForSequenceClassification(
        BertConfig(
            vocab_size=VOCABULARY,
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=64,
            max_position_embeddings=32,
            num_labels=3,
        )
    )


def gpt2() -> nn.Module:
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=VOCABULARY,
            n_embd=32,
            n_layer=2,
            n_head=4,
            n_positions=64,
            bos_token_id=1,
            eos_token_id=2,
            pad_token_id=0,
        )
    )


def llama() -> nn.Module:
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            intermediate_size=64,
            max_position_embeddings=64,
            pad_token_id=0,
        )
    )


def t5() -> nn.Module:
    return T5ForConditionalGeneration(
        T5Config(
            vocab_size=VOCABULARY, d_model=32, num_layers=1, num_heads=4, d_ff=64, d_kv=8, decoder_start_token_id=0
        )
    )


def bart() -> nn.Module:
    return BartForConditionalGeneration(
        BartConfig(
            vocab_size=VOCABULARY,
            d_model=32,
            encoder_layers=1,
            decoder_layers=1,
            encoder_attention_heads=4,
            decoder_attention_heads=4,
            encoder_ffn_dim=64,
            decoder_ffn_dim=64,
            max_position_embeddings=64,
            forced_eos_token_id=None,
        )
    )


def vit() -> nn.Module:
    return ViTForImageClassification(
        ViTConfig(
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=64,
            image_size=32,
            patch_size=8,
            num_labels=3,
        )
    )


def _text() -> dict[str, Tensor]:
    return {"input_ids": ids()}


def _pairs() -> dict[str, Tensor]:
    return {"input_ids": ids(), "decoder_input_ids": ids(2, 5)}


_ATTENTION = ({"role": ["attn.q", "attn.v"]}, {"role": "block"}, {"role": "norm"}, {"role": "embed"}, {"role": "head"})
_FUSED = ({"role": "attn.qkv"}, *_ATTENTION[1:])
_PLAIN = ({"type": "Linear"}, "head", {"type": "LayerNorm"})

ARCHITECTURES = {
    a.name: a
    for a in (
        Architecture("bert", bert, _text, _ATTENTION),
        Architecture("gpt2", gpt2, _text, _FUSED),
        Architecture("llama", llama, _text, _ATTENTION),
        Architecture("t5", t5, _pairs, _ATTENTION),
        Architecture("bart", bart, _pairs, _ATTENTION),
        Architecture("vit", vit, lambda: {"pixel_values": images()}, _ATTENTION),
        Architecture("traceable-symbolic", Traceable, images, _PLAIN, "symbolic"),
        Architecture("traceable-modules", Traceable, images, _PLAIN),
        Architecture("branching", Branching, ids, (*_PLAIN, {"type": "Embedding"})),
    )
}
TRANSFORMERS = tuple(name for name in ARCHITECTURES if name in {"bert", "gpt2", "llama", "t5", "bart", "vit"})


class Counting(nn.Module):
    """Writes two buffers in every forward: one in place, one by replacing it."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros(()))
        self.register_buffer("last", torch.zeros(4))
        self.register_buffer("absent", None)

    def forward(self, x: Tensor) -> Tensor:
        self.count.add_(1)
        self.last = x.detach().mean(0)
        return x * self.count


@torch.no_grad()
def first_output(model: nn.Module, inputs: Any) -> Tensor:
    """Run a model on inputs as `Architecture.inputs` gives them."""
    args, kwargs = call_arguments(inputs)
    output = model(*args, **kwargs)
    return output if isinstance(output, Tensor) else output[0]
