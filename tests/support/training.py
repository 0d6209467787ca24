"""What tests of training steps share: gradients of a step, bytes that autograd keeps, passes that serve tiny models."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from deltaspec.backbone.inputs import call_arguments


def serve_small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let passes work on models that are too small to gain from them."""
    monkeypatch.setattr("deltaspec.graphs.passes.recompute.FEW", 1)
    monkeypatch.setattr("deltaspec.graphs.passes.recompute_parts.FEW", 1)
    monkeypatch.setattr("deltaspec.graphs.dropouts.FEW", 1)
    monkeypatch.setattr("deltaspec.graphs.activations.FEW", 1)


def spread(model: nn.Module, seed: int = 0) -> None:
    """Give trainable parameters values at which nothing is zero, always the same for the same names."""
    for name, parameter in sorted(model.named_parameters()):
        if parameter.requires_grad:
            generator = torch.Generator().manual_seed(seed + sum(map(ord, name)))
            with torch.no_grad():
                parameter.add_(torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype) * 0.05)


def loss_of(model: Callable[..., Any], inputs: Any) -> Tensor:
    """Run a model and make one number of what it gives."""
    args, kwargs = call_arguments(inputs)
    output = model(*args, **kwargs)
    if isinstance(output, dict) and "logits" in output:
        output = output["logits"]
    output = output if isinstance(output, Tensor) else output[0]
    weights = torch.linspace(-1, 1, output.numel(), dtype=output.dtype).view(output.shape)
    return (output * weights).sum()


def gradients(model: nn.Module, inputs: Any, seed: int = 0) -> dict[str, Tensor]:
    """Return the gradients of one step by parameter, and the loss as `""`."""
    for parameter in model.parameters():
        parameter.grad = None
    torch.manual_seed(seed)
    loss = loss_of(model, inputs)
    loss.backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return {"": loss.detach(), **found}


def assert_same_gradients(ours: dict[str, Tensor], theirs: dict[str, Tensor], tolerance: float = 2e-5) -> None:
    """Compare relatively to the largest value of each gradient."""
    assert ours.keys() == theirs.keys()
    for name, gradient in ours.items():
        scale = max(theirs[name].abs().max().item(), 1e-6)
        assert (gradient - theirs[name]).abs().max().item() <= tolerance * scale, name


def kept_bytes(model: nn.Module, inputs: Any) -> int:
    """Return the bytes of the storages that autograd keeps of a forward, parameters apart."""
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        if (place := tensor.untyped_storage().data_ptr()) not in own:
            kept.setdefault(place, tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss_of(model, inputs)
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
