"""Models on the meta device whose published parameter counts tests compare."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import T5Config, T5ForConditionalGeneration, ViTConfig, ViTForImageClassification

import deltaspec
from deltaspec.planning.plan import Plan

SUBLAYERS = {"role": ["attn.o", "mlp.down"]}
"""Where the Compacter paper puts adapters: not after the decoder's cross-attention."""


def t5_base() -> nn.Module:
    """T5-base, 222.9 million parameters."""
    config = T5Config(d_model=768, d_kv=64, d_ff=3072, num_layers=12, num_heads=12, vocab_size=32128)
    with torch.device("meta"):
        return T5ForConditionalGeneration(config)


def t5_xl() -> nn.Module:
    """T5 v1.1 XL, the model behind T0-3B."""
    config = T5Config(d_model=2048, d_kv=64, d_ff=5120, num_layers=24, num_heads=32, feed_forward_proj="gated-gelu")
    with torch.device("meta"):
        return T5ForConditionalGeneration(config)


def vit_base(labels: int) -> nn.Module:
    """ViT-B/16."""
    with torch.device("meta"):
        return ViTForImageClassification(ViTConfig(num_labels=labels))


def planned(model: nn.Module, *deltas: dict[str, Any]) -> Plan:
    """Plan deltas, which get names by number."""
    return deltaspec.plan(model, {"deltaspec": 1, "deltas": [{"name": f"d{i}", **d} for i, d in enumerate(deltas)]})
