"""A module for Lightning, which processes that are spawned import."""

from __future__ import annotations

from typing import Any

import lightning
import torch
from torch import Tensor
from trained import SPEC, llama

import deltaspec


class Module(lightning.LightningModule):
    """What a user writes: the compiled model, its loss and an optimizer of what it trains."""

    def __init__(self, whole: bool = True) -> None:
        super().__init__()
        compiled = deltaspec.compile(llama(), SPEC)
        self.model = compiled if whole else compiled.backbone
        self.found: list[float] = []

    def training_step(self, batch: Tensor, _: Any) -> Tensor:
        loss: Tensor = self.model(input_ids=batch, labels=batch).loss
        self.found.append(loss.item())
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=0.05)
