"""Activation functions by the names that specs use."""

from __future__ import annotations

from typing import Any, Literal

Activation = Literal["gelu", "gelu_tanh", "relu", "silu", "tanh", "sigmoid", "leaky_relu", "identity"]


def activate(name: Activation, value: Any) -> Any:
    """Apply an activation function to a tensor (or to its stand-in while tracing)."""
    import torch
    from torch.nn import functional as F

    match name:
        case "gelu":
            return F.gelu(value)
        case "gelu_tanh":
            return F.gelu(value, approximate="tanh")
        case "relu":
            return F.relu(value)
        case "silu":
            return F.silu(value)
        case "tanh":
            return torch.tanh(value)
        case "sigmoid":
            return torch.sigmoid(value)
        case "leaky_relu":
            return F.leaky_relu(value)
        case "identity":
            return value
