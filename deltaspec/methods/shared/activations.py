"""Activation functions by the names that specs use."""

from __future__ import annotations

from typing import Any, Literal

Activation = Literal["gelu", "gelu_tanh", "relu", "silu", "tanh", "sigmoid", "leaky_relu", "identity"]


def activate(name: Activation, value: Any) -> Any:
    """Apply an activation function to a tensor (or to its stand-in while tracing)."""
    import torch
    from torch.nn import functional as F

    if name == "identity":
        return value
    if name == "gelu_tanh":
        return F.gelu(value, approximate="tanh")
    return getattr(torch if name in ("tanh", "sigmoid") else F, name)(value)
