"""A compiled model with five deltas and its views: what a view gives alone, and under threads that switch at random."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from models import ARCHITECTURES, Architecture
from torch import Tensor, nn

import deltaspec
from deltaspec.compiler.compiled import CompiledModel
from deltaspec.contract.trial import disturb
from deltaspec.diagnostics.findings import DeltaSpecError

LLAMA = ARCHITECTURES["llama"]
ROLES = {"role": ["attn.q", "attn.v", "mlp.up"]}


def lora(name: str, rank: int = 2, **more: Any) -> dict[str, Any]:
    return {"name": name, "method": "lora", "params": {"rank": rank}, "target": ROLES, "attached": False} | more


DELTAS = (
    lora("a"),
    lora("b"),
    lora("c", 3),
    {"name": "d", "method": "ia3", "attached": False},
    {"name": "e", "method": "bitfit", "target": {"role": "norm"}, "attached": False},
)


def build(*deltas: dict[str, Any], model: nn.Module | None = None, **options: Any) -> CompiledModel:
    spec = {"deltaspec": 1, "deltas": list(deltas or DELTAS)}
    compiled = deltaspec.compile(model or LLAMA.model(), spec, **options)
    disturb(compiled)
    return compiled


def outputs(compiled: Callable[..., Any], architecture: Architecture = LLAMA, **more: Any) -> Tensor:
    inputs = architecture.inputs()
    found = compiled(**inputs, **more) if isinstance(inputs, dict) else compiled(inputs, **more)
    result: Tensor = found if isinstance(found, Tensor) else found["logits"]
    return result


def code(error: pytest.ExceptionInfo[DeltaSpecError]) -> str:
    return error.value.diagnostics[0].code


def serve(view: CompiledModel, seed: int, names: tuple[str, ...], expected: dict[Any, Tensor], rounds: int) -> int:
    """Switch at random, and count the outputs that are not what they are alone."""
    torch.set_num_threads(1)
    choose, wrong = random.Random(seed), 0
    with torch.no_grad():
        for _ in range(rounds):
            name = choose.choice(names)
            match choose.randrange(5):
                case 0:
                    view.only(name)
                    wrong += not torch.equal(outputs(view), expected[name])
                case 1:
                    with view.only({name: 0.5}):
                        wrong += not torch.equal(outputs(view), expected[name, 0.5])
                case 2:
                    rows = [name, choose.choice([None, name])]
                    wrong += not torch.equal(outputs(view, deltas=rows), expected[tuple(rows)])
                case 3:
                    with view.detached():
                        wrong += not torch.equal(outputs(view), expected[None])
                case 4:
                    view.detach()
                    view.attach(name)
                    wrong += not torch.equal(outputs(view.backbone), expected[name])
    return wrong


@torch.no_grad()
def alone(compiled: CompiledModel, names: tuple[str, ...]) -> dict[Any, Tensor]:
    expected: dict[Any, Tensor] = {None: outputs(compiled.detach())}
    for name in names:
        with compiled.only(name):
            expected[name] = outputs(compiled)
        with compiled.only({name: 0.5}):
            expected[name, 0.5] = outputs(compiled)
        for rows in ((name, None), (name, name)):
            expected[rows] = outputs(compiled, deltas=rows)
    return expected
