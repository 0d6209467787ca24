"""Activations, alone and in front of a gate, as one step of autograd that keeps what entered and nothing else.

`act(g) * u` keeps `act(g)` for the gradient of `u`, and `g` for that of `act`. What an activation gives is marked, so
that the host's own code, whatever it is, shows whether it is multiplied: that product then keeps `g` and `u` alone.
Anything else that is done to it is done to the plain tensor.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from deltaspec.graphs.autocast import without_autocast
from deltaspec.graphs.elementwise import Kind, kind_of
from deltaspec.graphs.modes import is_checkpointed, is_rewritten

FEW = 1 << 17
"""Values below which autograd's own steps are faster than one in Python (measured)."""
_Run = Callable[[Tensor], Tensor]


class Activation:
    """What is known of one activation: it is found out when it first runs in training."""

    __slots__ = ("gates", "kind", "looked")

    def __init__(self) -> None:
        self.kind: Kind | None = None
        self.looked = False
        self.gates: bool | None = None
        """Whether the first thing that was done to what it gave was to multiply it; None: nothing was done yet."""


def activate(run: _Run, module: nn.Module, known: Activation, x: Tensor) -> Tensor:
    """Run an activation, whose own forward is `run`."""
    if (
        not torch.is_grad_enabled()
        or type(x) is not Tensor
        or not x.requires_grad
        or is_rewritten()
        or x.numel() < FEW
        or module._forward_hooks
        or module._backward_hooks
        or is_checkpointed()
    ):
        return run(x)
    if not known.looked:
        known.kind, known.looked = kind_of(module), True
    if known.kind is None:
        return run(x)
    y: Tensor = run(x) if known.kind == "simple" else Recomputed.apply(run, x)  # type: ignore[no-untyped-call]
    return y if known.gates is False else Gate.of(y, x, run, known)


class Recomputed(torch.autograd.Function):
    """A function of one tensor, which is run again in the backward. Its inputs: (the function, the tensor)."""

    @staticmethod
    def forward(ctx: Any, run: _Run, x: Tensor) -> Tensor:
        """Run it."""
        ctx.run = run
        ctx.save_for_backward(x)
        return run(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        """Run it again, and differentiate that."""
        [x] = ctx.saved_tensors
        return None, _through(ctx.run, x, gradient)


class GatedProduct(torch.autograd.Function):
    """act(g) · u. Its inputs: (act, act(g), g, u); gradients go to act(g) itself, whose own step knows the way to g."""

    @staticmethod
    def forward(ctx: Any, run: _Run, activated: Tensor, g: Tensor, u: Tensor) -> Tensor:
        """Multiply."""
        ctx.run = run
        ctx.save_for_backward(g, u)
        return activated * u

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        """Run the activation again."""
        g, u = ctx.saved_tensors
        _, to_activated, _, to_u = ctx.needs_input_grad
        for_u = None
        if to_u:
            with without_autocast(g.device):
                for_u = gradient * ctx.run(g)
        return None, gradient * u if to_activated else None, None, for_u


def _through(run: _Run, x: Tensor, gradient: Tensor) -> Tensor:
    """Return the gradient of what enters a function."""
    again = torch.is_grad_enabled()
    with torch.enable_grad(), without_autocast(x.device):
        entering = x if again and x.requires_grad else x.detach().requires_grad_()
        y = run(entering)
    return torch.autograd.grad(y, entering, gradient, create_graph=again)[0]


class Gate(Tensor):
    """What an activation gave, until something is done with it."""

    given: tuple[Tensor, Tensor, _Run, Activation]
    version: int | None
    """That of what entered; None where what was given may have been overwritten unseen."""

    @classmethod
    def of(cls, y: Tensor, x: Tensor, run: _Run, known: Activation) -> Gate:
        """Mark what an activation gave."""
        gate = y.as_subclass(cls)
        gate.given, gate.version = (y, x, run, known), x._version
        return gate

    @property
    def plain(self) -> Tensor:
        """The tensor itself."""
        return self.given[0]

    def alone(self) -> Tensor:
        """Return the tensor, which is not multiplied."""
        known = self.given[3]
        known.gates = bool(known.gates)
        return self.plain

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Multiply in one step, or do anything else with the plain tensor."""
        if func in _PRODUCTS and len(args) == 2 and not kwargs:
            gate, other = args if isinstance(args[0], Gate) else args[::-1]
            if type(other) is Tensor and other.requires_grad and gate.plain.shape == other.shape:
                y, x, run, known = gate.given
                if y.dtype is other.dtype and y._version == 0 and x._version == gate.version:
                    known.gates = True
                    return GatedProduct.apply(run, y, x, other)  # type: ignore[no-untyped-call]
        if getattr(func, "__name__", "") not in _FORM:
            for gate in (value for value in args if isinstance(value, Gate)):
                gate.alone()
        elif getattr(func, "__self__", None) is _DATA:  # whoever writes into it leaves no trace
            args[0].version = None
        args, kwargs = tree_map_only(Gate, lambda gate: gate.plain, (args, kwargs or {}))
        return func(*args, **kwargs)


_PRODUCTS = frozenset({torch.mul, torch.multiply, Tensor.mul, Tensor.multiply, Tensor.__mul__, Tensor.__rmul__})
_DATA: Any = Tensor.data
_FORM = frozenset("__get__ size dim numel stride is_contiguous is_floating_point".split())
"""Functions that look at a tensor's form, not at its values."""
