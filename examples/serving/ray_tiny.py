"""A tiny causal model and a library of deltas of several methods for it, to try the serving on."""

from __future__ import annotations

import random

import torch
from ray_replica import Score
from transformers import LlamaConfig, LlamaForCausalLM

import deltaspec

VOCABULARY = 97
METHODS = {
    "lora": ({"rank": 4}, {"role": ["attn.q", "attn.v"]}),
    "adapter": ({}, {"role": "mlp.down"}),
    "bitfit": ({}, {"role": "attn.o"}),
    "prefix": ({"tokens": 3}, {"role": "attn"}),
}
EACH = 6
"""Deltas of each method: more in all than a replica may hold."""


def backbone(width: int = 32, layers: int = 2) -> LlamaForCausalLM:
    """Return the same random weights each time."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=2 * width,
        max_position_embeddings=128,
        bos_token_id=None,
        eos_token_id=None,
    )
    return LlamaForCausalLM(config).eval()


def trained(model: LlamaForCausalLM, each: int = EACH, std: float = 0.3) -> deltaspec.CompiledModel:
    """Return a backbone with deltas of all methods, moved from where they start, and nothing attached."""
    deltas = [
        {"name": f"{method}-{number}", "method": method, "params": params, "target": target}
        for number in range(each)
        for method, (params, target) in METHODS.items()
    ]
    c = deltaspec.compile(model, {"deltaspec": 1, "deltas": deltas}).detach()
    for delta in c.deltas.values():
        for parameter in delta.parameters():
            torch.nn.init.normal_(parameter, std=std)
    return c


def requests(names: list[str], count: int) -> list[Score]:
    """Draw requests: mostly one delta whole, some at a strength, some two at once, some none; of a few texts."""
    draw = random.Random(0)
    texts = [[draw.randrange(1, VOCABULARY) for _ in range(draw.randint(3, 9))] for _ in range(10)]

    def mixture() -> dict[str, float]:
        kind = draw.random()
        if kind < 0.2:
            return {}
        if kind < 0.8:
            return {draw.choice(names): 1.0}
        if kind < 0.9:
            return {draw.choice(names): 0.5}
        first = draw.choice(names)
        second = draw.choice([name for name in names if name.split("-")[0] != first.split("-")[0]])
        return {first: 0.7, second: 0.3}

    mixtures = [mixture() for _ in range(60)]
    return [Score(ids=draw.choice(texts), deltas=draw.choice(mixtures)) for _ in range(count)]
