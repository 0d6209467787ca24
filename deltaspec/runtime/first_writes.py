"""The first forwards of a view: parameters that they write get memory of their own, which the user's model has not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from deltaspec.backbone.writes import OwnOnWrite, is_published
from deltaspec.runtime.forward_gate import ForwardGate


class FirstWrites:
    """Sees the first forward in training and in evaluation mode, then lets go.

    Codebooks that follow moving averages, and rows that are shortened to a norm, are written in a forward. What torch
    and transformers publish does not do that, beside what is known of embeddings (`norm_limited`).
    """

    def __init__(
        self, modules: list[nn.Module], gate: ForwardGate, wrote: Callable[[nn.Module, str, Tensor], None]
    ) -> None:
        """`wrote` is told of what was written: the module, the parameter's name, and the value before."""
        self._modules, self._gate, self._wrote = modules, gate, wrote
        self._seen: set[bool] = set()

    def arm(self) -> Callable[..., Any] | None:
        """Return what runs the first forwards; None where no module has code of its own."""
        return None if all(map(is_published, self._modules)) else self.run

    def run(self, backbone: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """Run a forward of the backbone, under observation if it is the first one in its mode."""
        forward: Any = type(backbone)._call_impl
        training = backbone.training
        if training in self._seen:
            return forward(backbone, *args, **kwargs)
        with OwnOnWrite(self._modules, self._wrote):
            output = forward(backbone, *args, **kwargs)
        self._seen.add(training)
        if len(self._seen) == 2:
            self._gate.first = None
        return output
