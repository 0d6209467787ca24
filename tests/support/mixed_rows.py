"""Batches whose rows are under different deltas, and each row alone, on the models of `tiny_models.py`."""

from __future__ import annotations

from typing import Any

import torch
from tiny_models import PARAMS, TOKENS
from torch import Tensor, nn

import deltaspec
from deltaspec.compiler.compiled import CompiledModel
from deltaspec.contract.trial import disturb
from deltaspec.methods.registry import builtin_methods, methods

PROMPTS = ("prefix", "soft_prompt", "p_tuning")
"""Tested in tests/serving/test_prompts.py."""
METHODS = tuple(name for name in builtin_methods() if name not in PROMPTS)
ROWS = ["a", None, "b", "a", {"b": 0.5}]


def entry(name: str, method: str, target: Any = None, **params: Any) -> dict[str, Any]:
    found = {"name": name, "method": method, "params": PARAMS[method] | {"dropout": 0.0} | params}
    if "dropout" not in methods()[method].Params.model_fields:
        del found["params"]["dropout"]
    return found | {"attached": False} | ({} if target is None else {"target": target})


def build(model: nn.Module, *deltas: dict[str, Any]) -> CompiledModel:
    compiled = deltaspec.compile(model, {"deltaspec": 1, "deltas": list(deltas)})
    disturb(compiled)
    return compiled


def ids(rows: int = 5, length: int = 6) -> Tensor:
    found = torch.randint(3, 48, (rows, length), generator=torch.Generator().manual_seed(2))
    found[:, 0] = torch.tensor(TOKENS)[torch.arange(rows) % len(TOKENS)]  # tokens that trainable_tokens has
    return found


def batch(architecture: str) -> dict[str, Tensor]:
    tokens = ids()
    mask = torch.ones_like(tokens)
    mask[0, :2] = 0
    mask[3, :1] = 0
    given = {"input_ids": tokens, "attention_mask": mask}
    return given | ({"decoder_input_ids": ids()[:, :4]} if architecture == "t5" else {})


def alone(compiled: CompiledModel, given: dict[str, Tensor], row: int, deltas: Any) -> Tensor:
    """Run one row by itself."""
    if isinstance(deltas, dict):
        names = deltas
    else:
        names = dict.fromkeys((deltas,) if isinstance(deltas, str) else deltas or (), 1.0)
    with compiled.only(names) if names else compiled.detached():
        return compiled(**{key: value[row : row + 1] for key, value in given.items()}).logits[0]


def close(left: Tensor, right: Tensor, tolerance: float = 2e-5) -> bool:
    return torch.allclose(left, right, rtol=tolerance, atol=tolerance)


def family(model: nn.Module) -> CompiledModel:
    """Deltas of many methods and ranks."""
    return build(
        model,
        entry("lora2", "lora"),
        entry("lora4", "lora", rank=4),
        entry("adapter", "adapter"),
        entry("bitfit", "bitfit"),
        entry("ia3", "ia3"),
        entry("reft", "reft"),
        entry("again", "lora"),
        entry("hira", "hira", {"role": ["mlp.up", "attn.o"]}),
    )
