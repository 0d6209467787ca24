"""Keeping the backbone's buffers as they are while deltas are attached."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from deltaspec.substitution import stand_in


def tracks_statistics(module: nn.Module) -> bool:
    """Tell whether a module writes running statistics in training mode."""
    return isinstance(module, nn.modules.batchnorm._NormBase) and module.running_mean is not None


class FrozenStatistics:
    """A BatchNorm's own forward, in evaluation mode whatever the model's mode is.

    The running statistics belong to the backbone. If training one delta moved them, every other delta's output, and the
    detached backbone's, would move too.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the norm on its running statistics."""
        shadow = stand_in(self.module, {})
        shadow.training = False
        return shadow.forward(*args, **kwargs)


class BufferGuard:
    """Puts back buffers that a forward wrote while deltas were attached (spectral norm, moving averages)."""

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        self._modules = list(modules)
        self._kept: list[tuple[dict[str, Any], str, Tensor, Tensor, int]] = []

    def watch(self) -> None:
        """Remember all buffers; copies are made anew only of those written since the last time."""
        known = {(id(home), name): entry for entry in self._kept for home, name in [entry[:2]]}
        kept = []
        for module in self._modules:
            for name, buffer in module._buffers.items():
                if buffer is None:
                    continue
                entry = known.get((id(module._buffers), name))
                if entry is None or entry[2] is not buffer or entry[4] != _version(buffer):
                    entry = (module._buffers, name, buffer, buffer.detach().clone(), _version(buffer))
                kept.append(entry)
        self._kept = kept

    def restore(self) -> None:
        """Make every buffer what it was, object and bits."""
        for index, (home, name, buffer, copy, version) in enumerate(self._kept):
            home[name] = buffer
            if _version(buffer) != version:
                with torch.no_grad():
                    buffer.copy_(copy)
                self._kept[index] = (home, name, buffer, copy, _version(buffer))


def _version(tensor: Tensor) -> int:
    # Tensors made under inference_mode keep no count of writes.
    return -1 if tensor.is_inference() else tensor._version
