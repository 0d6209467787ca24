"""Low-rank updates as operands, and as two deltas on a net of two linear layers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

import deltaspec
from deltaspec.graphs.passes.fuse_addition import add_low_rank, add_low_rank_, add_product, add_product_

SHAPES = ((5,), (1, 5), (3, 5), (1, 1, 5), (2, 3, 5), (2, 1, 40, 5), (64, 5), (0, 5), (2, 0, 5))
ROUND_OFF = {
    torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 5e-2, torch.float16: 5e-3,
}  # fmt: skip


def operands(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    torch.manual_seed(0)
    host = nn.Linear(5, 7)
    x = torch.randn(shape)
    tensors = (F.linear(x, host.weight, host.bias), x, torch.randn(2, 5), torch.randn(7, 2))
    return tuple(t.detach().to(dtype) for t in tensors)


def plain(y: Tensor, x: Tensor, down: Tensor, up: Tensor, scale: float) -> Tensor:
    return torch.add(y, F.linear(F.linear(x, down), up), alpha=scale)


def product(function: Any) -> Any:
    return lambda y, x, down, up, *scale: function(y, F.linear(x, down), up, *scale)


FORMS = {
    "add_low_rank": add_low_rank,
    "add_low_rank_": add_low_rank_,
    "add_product": product(add_product),
    "add_product_": product(add_product_),
}
forms = pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)


def graph_of(code: Any, *names: str) -> fx.Graph:
    """Trace a formula over `base` and placeholders."""

    class Leaf(fx.Tracer):
        def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
            return True

    class Root(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.base = nn.Linear(5, 7)

    space: dict[str, Any] = {"code": code}
    exec(f"def forward(self, {', '.join(names)}): return code(self.base, {', '.join(names)})", space)
    Root.forward = space["forward"]
    return Leaf().trace(Root())


def called(graph: fx.Graph) -> list[str]:
    return [
        getattr(n.target, "__name__", str(n.target)) for n in graph.nodes if n.op in ("call_function", "call_module")
    ]


def lora(base: Any, x: Any, down: Any, up: Any, *_: Any) -> Any:
    return torch.add(base(x), F.linear(F.linear(x, down), up), alpha=2.0)


class Net(nn.Module):
    """Two linear layers, the first of which is told by a hook what it gave."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(5, 7), nn.Linear(7, 4, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(x)))


def compiled(capture: str = "modules", model: nn.Module | None = None, **params: Any) -> deltaspec.CompiledModel:
    deltas = [
        {"name": name, "method": "lora", "params": {"rank": 2, **params}, "target": {"type": "Linear"}}
        for name in ("a", "b")
    ]
    torch.manual_seed(0)
    model = (model or Net()).eval()
    made = deltaspec.compile(
        model, {"deltaspec": 1, "deltas": deltas}, capture=capture, example_inputs=torch.ones(2, 5)
    )
    for parameter in made.trainable_parameters():
        nn.init.normal_(parameter, std=0.5)
    return made


def reference(c: deltaspec.CompiledModel, x: Tensor, names: tuple[str, ...] = ("a", "b")) -> Tensor:
    for place, host in (("first", c.backbone.first), ("second", c.backbone.second)):
        y = F.linear(x, host.weight, host.bias)
        for name in names:
            delta = c.deltas[name]
            y = y + 8.0 * F.linear(F.linear(x, delta.tensor(f"{place}.down")), delta.tensor(f"{place}.up"))
        x = torch.tanh(y) if place == "first" else y
    return x
