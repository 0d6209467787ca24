"""Steps of recipes: what is computed to make a tensor again."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

Steps = tuple[Any, ...]
"""`(place,)`, a tensor that is kept; or (function, steps of its tensors, its other arguments)."""


def make(steps: Steps, kept: tuple[Tensor, ...]) -> Tensor:
    """Make the tensor again."""
    if len(steps) == 1:
        return kept[steps[0]]
    function, inner, others = steps
    made: Tensor = function(*[make(step, kept) for step in inner], *others)
    return made


class Again:
    """What a node of the graph has in the place of a tensor that it kept: how that is made again."""

    def __init__(self, steps: Steps, kept: tuple[Tensor, ...]) -> None:
        self.steps, self.kept = steps, kept
        self.versions = [tensor._version for tensor in kept]

    def __call__(self, _: Tensor) -> Again:
        """Take the tensor's place."""
        return self

    def unpacked(self) -> Tensor:
        """Make the tensor again. Raise RuntimeError where what it is made of was overwritten."""
        if [tensor._version for tensor in self.kept] != self.versions:
            raise RuntimeError(
                "one of the variables needed for gradient computation has been modified by an inplace operation"
            )
        with torch.no_grad():
            return make(self.steps, self.kept)


def run_alone(x: Tensor, run: Callable[[Tensor], Tensor]) -> Tensor:
    """Run an activation."""
    return run(x)


def run_gated(g: Tensor, u: Tensor, run: Callable[[Tensor], Tensor]) -> Tensor:
    """Run an activation, and multiply."""
    return run(g) * u


def run_gelu(x: Tensor, approximate: str) -> Tensor:
    """Run GELU."""
    return F.gelu(x, approximate=approximate)


def run_dropped(x: Tensor, mask: Tensor, scale: float) -> Tensor:
    """Drop what a mask says."""
    return x * mask * scale


def run_layer_norm(x: Tensor, mean: Tensor, rstd: Tensor, *affine: Tensor) -> Tensor:
    """Normalise by statistics that were kept."""
    if torch.is_grad_enabled():  # gradients of gradients go through the statistics, too
        dims = [d - x.dim() for d in range(x.dim()) if mean.shape[d] == 1 and x.shape[d] != 1] or [-1]
        centred = x - x.mean(dims, keepdim=True)
        variance = centred.square().mean(dims, keepdim=True)
        epsilon = (rstd**-2 - variance).detach()
        normed = centred * (variance + epsilon).rsqrt()
    else:
        normed = torch.sub(x, mean).mul_(rstd).to(x.dtype)
    return torch.addcmul(affine[1], normed, affine[0]) if affine else normed


def run_cast(x: Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Cast and move."""
    return x.to(device, dtype)
