"""What a real step of training takes: the bytes that autograd keeps, and those of parameters, gradients, states."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from deltaspec.compiler.compiled import CompiledModel


class Measured(NamedTuple):
    parameters: int
    delta_parameters: int
    gradients: int
    optimizer_state: int
    activations: int


def measure(
    c: CompiledModel, loss: Callable[[], Tensor], optimizer: Callable[[Any], torch.optim.Optimizer] = torch.optim.AdamW
) -> Measured:
    """Take one real step with what is attached."""
    c.train()
    deltas = {id(t): t for delta in c.deltas.values() for t in (*delta.parameters(), *delta.buffers())}
    base = [t for t in (*c.backbone.parameters(), *c.backbone.buffers()) if id(t) not in deltas]
    trained = [p for p in c.parameters() if p.requires_grad]
    steps = optimizer(trained)
    activations = kept(c.backbone, loss, backward=True)
    gradients = size(p.grad for p in trained if p.grad is not None)
    steps.step()
    states = [value for state in steps.state.values() for value in state.values() if isinstance(value, Tensor)]
    return Measured(size(base), size(deltas.values()), gradients, size(states), activations)


def kept(model: nn.Module, loss: Callable[[], Tensor], *, backward: bool = False) -> int:
    """Return the bytes of the storages that autograd keeps of a forward, but for the model's own."""
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    found: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            found[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = loss()
    count = sum(storage.nbytes() for storage in found.values())
    if backward:
        result.backward()
    return count


def size(tensors: Iterable[Tensor]) -> int:
    return sum({id(t): t.numel() * t.element_size() for t in list(tensors)}.values())
