"""A small net whose plans are known to the digit, and the findings of specs that do not fit it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    RobertaConfig,
    RobertaModel,
)

from deltaspec.diagnostics.codes import CODES
from deltaspec.diagnostics.findings import DeltaSpecError, Diagnostic
from deltaspec.planning.resolve import plan

QV = ["**.query", "**.value"]


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.norm = nn.LayerNorm(width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(torch.relu(self.up(self.norm(x))))


class Net(nn.Module):
    """Two blocks, a head that is used and one that is not."""

    def __init__(self, width: int = 8, layers: int = 2) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(width) for _ in range(layers))
        self.head, self.spare = nn.Linear(width, 3), nn.Linear(width, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        return self.head(x)


INPUT = torch.zeros(2, 5, 8)


def spec(*deltas: dict[str, Any], **rest: Any) -> dict[str, Any]:
    return {"deltaspec": 1, "deltas": [{"name": f"d{i}", "method": "lora"} | d for i, d in enumerate(deltas)], **rest}


def refused(model: nn.Module, *specs: Any, example_inputs: Any = None) -> list[Diagnostic]:
    with pytest.raises(DeltaSpecError) as caught:
        plan(model, *specs, example_inputs=example_inputs)
    findings = list(caught.value.diagnostics)
    assert all(finding.code in CODES or finding.code[:3] == "DS3" for finding in findings)
    return findings


def codes(model: nn.Module, *specs: Any, example_inputs: Any = None) -> list[str]:
    return [finding.code for finding in refused(model, *specs, example_inputs=example_inputs)]


def roberta(**sizes: Any) -> RobertaModel:
    base = {"vocab_size": 50265, "max_position_embeddings": 514, "type_vocab_size": 1}
    with torch.device("meta"):
        return RobertaModel(RobertaConfig(**(base | sizes)))


def tiny_bert() -> BertForSequenceClassification:
    config = BertConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=3, num_attention_heads=2, intermediate_size=32, num_labels=4
    )
    return BertForSequenceClassification(config)
