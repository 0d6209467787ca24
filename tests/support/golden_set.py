"""Deltas of several methods on a tiny Llama, saved with golden answers."""

from __future__ import annotations

from pathlib import Path

import torch
from moved import moved
from tiny_models import base

import deltaspec
from deltaspec.compiler.compiled import CompiledModel

SPEC = {
    "deltaspec": 1,
    "deltas": [
        {"name": "low", "method": "lora", "params": {"rank": 2}, "provenance": {"data": "tweets", "steps": [1, 2]}},
        {"name": "bias", "method": "bitfit", "target": {"role": "mlp.up"}, "attached": False},
    ],
}
INPUTS = {
    "input_ids": torch.tensor([[0, 0, 5, 9, 11], [7, 3, 30, 21, 8]]),
    "attention_mask": torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]]),
}


def build(number: int = 1) -> CompiledModel:
    return moved(deltaspec.compile(base("llama"), SPEC), number)


def save(folder: Path, number: int = 1) -> CompiledModel:
    compiled = build(number)
    compiled.save(folder, golden=INPUTS)
    return compiled
