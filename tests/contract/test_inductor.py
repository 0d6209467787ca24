"""Methods under torch.compile's own backend: captures, strengths, rows and a training step, tokens flat and batched.

Every test here goes through Inductor's decompositions and passes, which rewrite what deltas emit; code is generated and
compiled in one of them, and in all by `make test-inductor` (minutes).
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from typing import Any

import pytest
import torch
from inductor import inductor_passes
from torch import Tensor, nn

import deltaspec
from deltaspec.compiler.compiled import CompiledModel
from deltaspec.contract.trial import disturb

METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "lora": ("lora", {"rank": 4, "alpha": 16}),
    "dora": ("lora", {"rank": 4, "alpha": 16, "use_dora": True}),
    "lora with bias": ("lora", {"rank": 2, "alpha": 6, "bias": True}),
    "adalora": ("adalora", {"rank": 2, "alpha": 6}),
    "adapter": ("adapter", {"width": 4, "scale": 4.0}),
    "parallel_adapter": ("parallel_adapter", {"width": 4, "scale": 4.0}),
    "boft": ("boft", {"block_size": 2}),
    "hira": ("hira", {"rank": 2}),
    "reft": ("reft", {"rank": 2}),
}
SHAPES = {"flat": (3, 16), "batched": (2, 3, 16)}


class Net(nn.Module):
    """A layer with a bias, whose product Inductor fuses with it, and one without."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(16, 24), nn.Linear(24, 8, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down(torch.tanh(self.up(x)))
        return out


def compiled(capture: str, *names: str, attached: bool = True) -> CompiledModel:
    torch.manual_seed(0)
    deltas = []
    for name in names:
        method, params = METHODS[name]
        delta = {"name": name.replace(" ", "_"), "method": method, "params": params, "attached": attached}
        deltas.append(delta | {"target": {"type": "Linear"}})
    spec = {"deltaspec": 1, "deltas": deltas}
    c = deltaspec.compile(Net().eval(), spec, example_inputs=torch.randn(2, 16), capture=capture)
    disturb(c)
    return c


def agree(run: Callable[..., list[Tensor]], models: list[CompiledModel], x: Tensor, backend: Any) -> None:
    """Compare one graph of all these forwards, and its gradients, with the plain forwards."""
    torch._dynamo.reset()

    def step(outputs: list[Tensor]) -> list[Tensor]:
        for model in models:
            model.zero_grad()
        torch.stack([output.square().sum() for output in outputs]).sum().backward()
        return [p.grad.clone() for model in models for p in model.parameters() if p.grad is not None]

    plain, fast = run(x), torch.compile(run, fullgraph=True, backend=backend)(x)
    torch.testing.assert_close(fast, plain, atol=1e-5, rtol=1e-5)
    if plain[0].requires_grad:
        gradients = step(plain)
        assert gradients
        torch.testing.assert_close(step(fast), gradients, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("capture", ["modules", "symbolic"])
def test_forwards_and_a_training_step(capture, shape, codegen):
    """Each method alone, and two of them stacked."""
    names = list(METHODS) if shape == "flat" and capture == "modules" else ["lora", "lora with bias", "adapter"]
    models = [compiled(capture, name) for name in names]
    models.append(compiled(capture, "lora", "adapter"))
    x = torch.randn(SHAPES[shape])
    agree(lambda x: [model(x) for model in models], models, x, "inductor" if codegen else inductor_passes)


@pytest.mark.parametrize("shape", SHAPES)
def test_strengths_and_rows(shape, codegen):
    """Without gradients, where passes overwrite and rows fuse."""
    models = [compiled("modules", name, attached=False) for name in ("lora", "adapter", "adalora")]
    for model in models:
        model.attach(strength=0.5)
    x = torch.randn(SHAPES[shape])
    backend = "inductor" if codegen else inductor_passes
    with torch.no_grad():
        agree(lambda x: [model(x) for model in models], models, x, backend)
        for model in models:
            model.detach()
        [[first], [second], [third]] = [list(model.deltas) for model in models]
        rows = [[first, None, {first: 0.5}], [second, None, second], [None, {third: 0.5}, third]]
        slots = [model.rows(row[: len(x)]) for model, row in zip(models, rows, strict=True)]
        agree(lambda x: [model(x, deltas=slot) for model, slot in zip(models, slots, strict=True)], models, x, backend)


def test_generated_code():
    """The plainest case: a layer's update is scaled, forwards and backwards."""
    if shutil.which("g++") is None:
        pytest.skip("Inductor needs a C++ compiler")
    model = compiled("modules", "lora")
    agree(lambda x: [model(x)], [model], torch.randn(3, 16), "inductor")
