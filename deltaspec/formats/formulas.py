"""What the libraries' bottlenecks compute, in the terms of our methods: activations, scales, hypercomplex products."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor

    from deltaspec.methods.shared.activations import Activation

ACTIVATIONS: dict[str, Activation] = {
    "relu": "relu", "tanh": "tanh", "sigmoid": "sigmoid", "swish": "silu", "silu": "silu",
    "gelu": "gelu", "gelu_orig": "gelu", "gelu_python": "gelu",
    "gelu_new": "gelu_tanh", "gelu_fast": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh",
    "leakyrelu": "leaky_relu", "leaky_relu": "leaky_relu", "linear": "identity",
}  # fmt: skip
"""Our names of activations, by those of transformers and of both libraries."""


def kronecker_sum(rule: Tensor, weight: Tensor) -> Tensor:
    """Return Σᵢ kron(rule[i], weight[i]), `[in, out]`, of a rule `[n, n, n]` and weights `[n, in/n, out/n]`."""
    blocks: Tensor = torch.einsum("iac,ibd->abcd", rule, weight)
    return blocks.reshape(rule.shape[1] * weight.shape[1], rule.shape[2] * weight.shape[2])


def hypercomplex(rule: Tensor, left: Tensor, right: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return rule, left and right factors as method compacter has them.

    There x·H + b with H = Σᵢ kron(rule[i], left[i] right[i]); here (Σᵢ kron(Cᵢ, Lᵢ Rᵢ)) x + b.
    """
    turned = (part.transpose(1, 2).contiguous() for part in (rule, right, left))
    rules, lefts, rights = turned
    return rules, lefts, rights


def factored(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return factors whose product a stack of whole matrices `[n, a, b]` is, the smaller one being the identity."""
    _, rows, columns = weight.shape
    identity = torch.eye(min(rows, columns), dtype=weight.dtype).expand(len(weight), -1, -1).contiguous()
    return (weight, identity) if columns <= rows else (identity, weight)


def padded(tensors: dict[str, Tensor], rank: int) -> dict[str, Tensor]:
    """Return the tensors with factors of this rank, with zeros where they have a lower one."""
    for way in ("down", "up"):
        left, right = tensors[f"{way}_left"], tensors[f"{way}_right"]
        if (short := rank - left.shape[2]) > 0:
            tensors[f"{way}_left"] = torch.nn.functional.pad(left, (0, short))
            tensors[f"{way}_right"] = torch.nn.functional.pad(right, (0, 0, 0, short))
    return tensors
