"""What the tests of the bottleneck methods share: a formula against a compiled site, and what all of them promise."""

from __future__ import annotations

import copy
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from weight_methods import compiled, run, stir


class Sublayer(nn.Module):
    """Called by keyword, gives a tuple, as attention blocks of transformers do."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(16, 16)

    def forward(
        self, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs: Any
    ) -> tuple[Tensor, None]:
        return torch.tanh(self.inner(hidden_states)), None


class Toy(nn.Module):
    """A sublayer called by keyword, then a linear one."""

    def __init__(self) -> None:
        super().__init__()
        self.sub, self.out = Sublayer(), nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.out(x + self.sub(attention_mask=None, hidden_states=x)[0])
        return out


def toy() -> tuple[nn.Module, Any]:
    torch.manual_seed(0)
    return Toy().eval(), (torch.randn(2, 5, 16),)


def follows(
    method: str, params: dict[str, Any], formula: Callable[[Any, Tensor, Callable[[Tensor], Tensor]], Tensor]
) -> None:
    """Check output and gradients on the toy's sublayer against `formula(tensors, x, host)`, written in plain torch."""
    model, inputs = toy()
    c = compiled(model, inputs, method, params, "sub")
    stir(c, std=0.3)
    tensors = {s.name: c.deltas["d"].tensor(s.key or f"sub.{s.name}") for s in c.plan.sites[0].tensors}
    twins = {name: t.detach().clone().requires_grad_() for name, t in tensors.items()}
    x = inputs[0]
    expected = model.out(x + formula(SimpleNamespace(**twins), x, lambda h: model.sub(h)[0]))
    seen = run(c, inputs)
    torch.testing.assert_close(seen, expected, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(seen, run(model, inputs), atol=1e-3)
    seen.square().sum().backward()
    expected.square().sum().backward()
    for name, tensor in tensors.items():
        scale = twins[name].grad.abs().max().clamp_min(1.0).item()
        torch.testing.assert_close(tensor.grad, twins[name].grad, atol=1e-5 * scale, rtol=1e-4, msg=name)


def keeps_promises(
    made: tuple[nn.Module, Any], method: str, params: dict[str, Any], target: Any, identity: bool
) -> None:
    """Check identity at the start, that detaching is exact, that only the delta learns, and half precision."""
    model, inputs = made
    model.requires_grad_(False)
    plain = run(model, inputs)
    c = compiled(model, inputs, method, params, target)
    assert sum(p.numel() for p in c.trainable_parameters()) == c.plan.trainable
    if identity:
        assert torch.equal(run(c, inputs), plain)
    stir(c)
    run(c, inputs).square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in c.trainable_parameters())
    with c.detached():
        assert torch.equal(run(c, inputs), plain)
    half = compiled(copy.deepcopy(model).bfloat16(), inputs, method, params, target)
    assert run(half, inputs).dtype == torch.bfloat16
    assert next(half.trainable_parameters()).dtype == torch.float32
