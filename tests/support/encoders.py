"""One small BERT encoder, always with the same weights, in several classes whose heads are drawn anew each time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from moved import moved
from torch import Tensor, nn
from transformers import BertConfig, BertModel

import deltaspec
from deltaspec.compiler.compiled import CompiledModel

SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24, "vocab_size": 40}
INPUTS = {"input_ids": torch.tensor([[1, 7, 3, 9], [4, 2, 6, 0]])}
LORA = {"name": "lora", "method": "lora", "params": {"rank": 2}}
HEAD = {"name": "head", "method": "full", "target": "classifier"}


def encoder(kind: type[Any] = BertModel, head: int = 0, **options: Any) -> Any:
    """Build a class around the encoder; `head` seeds what is not in it."""
    config = BertConfig(**SIZES, **options)
    torch.manual_seed(1)
    core = BertModel(config)
    for parameter in core.parameters():
        if parameter.dim() == 1:
            nn.init.normal_(parameter, mean=float(parameter.detach().mean()), std=0.05)
    torch.manual_seed(100 + head)
    model = kind(config)
    getattr(model, "bert", model).load_state_dict(core.state_dict(), strict=False)
    return model.eval()


def trained(model: nn.Module, *deltas: dict[str, Any], number: int = 1, **options: Any) -> CompiledModel:
    """Compile, and move all trained tensors off their initial values."""
    compiled = deltaspec.compile(model, {"deltaspec": 1, "deltas": list(deltas)}, **options)
    return moved(compiled, number)


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        out = model(**INPUTS)
    found: Tensor = out.logits if "logits" in out else out.last_hidden_state
    return found


def notes(compiled: CompiledModel) -> str:
    return "\n".join(note for delta in compiled.plan.deltas for note in (*delta.notes, *delta.let_pass))


def saved(folder: Path, compiled: CompiledModel) -> Path:
    compiled.save(folder)
    return folder
