"""Training and evaluation mode, which each module has for itself."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def mode_of(model: nn.Module, training: bool) -> Iterator[None]:
    """Put a model into training or evaluation mode; then each of its modules into the one that it was in."""
    before = [(module, module.training) for module in model.modules()]
    model.train(training)
    try:
        yield
    finally:
        for module, was in before:
            module.training = was
