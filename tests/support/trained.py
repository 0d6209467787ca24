"""What trainers are tried on: a small language model, its tokenizer, texts, rows, and the arguments of a few steps."""

from __future__ import annotations

import random
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

SPECIAL = {"pad_token": "<pad>", "bos_token": "<bos>", "eos_token": "<eos>", "unk_token": "<unk>"}
WORDS = [f"w{i}" for i in range(56)]
SIZE = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1)
LORA = {"name": "d", "method": "lora", "params": {"rank": 4}, "target": {"path": ["**.q_proj", "**.down_proj"]}}
SPEC = {"deltaspec": 1, "deltas": [LORA]}
IDS = torch.randint(4, 60, (8, 6), generator=torch.Generator().manual_seed(5))
ROWS = [{"input_ids": row, "labels": row} for row in IDS]


def llama(**changes: Any) -> LlamaForCausalLM:
    """Return a new model, always with the same weights."""
    torch.manual_seed(0)
    tokens = dict(vocab_size=60, pad_token_id=0, bos_token_id=1, eos_token_id=2)
    return LlamaForCausalLM(LlamaConfig(**{**SIZE, **tokens, "max_position_embeddings": 64, **changes}))


def tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer that knows 56 words."""
    words = [*SPECIAL.values(), *WORDS]
    made = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=made, **SPECIAL)


def texts(seed: int, count: int = 8) -> list[str]:
    """Return texts of these words."""
    draw = random.Random(seed)
    return [" ".join(draw.choices(WORDS, k=draw.randrange(4, 10))) for _ in range(count)]


def arguments(folder: Any, **changes: Any) -> dict[str, Any]:
    """Return arguments of three steps, on the CPU, with a checkpoint after two."""
    return {
        "output_dir": str(folder), "max_steps": 3, "per_device_train_batch_size": 4, "learning_rate": 0.05,
        "save_steps": 2, "logging_steps": 1, "report_to": [], "use_cpu": True, "disable_tqdm": True, **changes,
    }  # fmt: skip


def losses(trainer: Any) -> list[float]:
    """Return the losses that a trainer logged, step by step."""
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
