"""Keeping the backbone's buffers as they are while deltas are attached."""

from __future__ import annotations

import operator
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from deltaspec.backbone.stand_in import stand_in


def tracks_statistics(module: nn.Module) -> bool:
    """Return whether a module writes running statistics in training mode."""
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


class Flags:
    """Takes the backbone's own parameters out of training, and puts back those that were in.

    Users may change flags while nothing is attached, so each time all are read: that is the floor of the cost.
    """

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        self._modules = list(modules)
        self._parameters: dict[tuple[int, str], nn.Parameter] = {}
        self._distinct: list[nn.Parameter] = []
        self._thawed: list[nn.Parameter] = []
        self._homes: list[dict[str, Any]] = []
        self._names: list[str] = []
        self._found: list[nn.Parameter] = []
        """The same as three columns, to be compared quickly."""
        self.moved = True
        """Whether parameters may have been replaced (cast, loaded, copied) since they were found."""

    def freeze(self) -> None:
        """Freeze all, and remember which were in training."""
        if self.moved or self._is_stale():
            self._find()
        self._thawed = [parameter for parameter in self._distinct if parameter.requires_grad]
        for parameter in self._thawed:
            parameter.requires_grad = False

    def thaw(self) -> None:
        """Put those back that were in."""
        for parameter in self.thawed():
            parameter.requires_grad = True
        self._thawed = []

    def thawed(self) -> list[nn.Parameter]:
        """Return the parameters that were in training before all were taken out."""
        if self.moved or self._is_stale():
            self._find()
        return self._thawed

    def _is_stale(self) -> bool:
        """Return whether others stand where parameters were (FSDP, `setattr`, a load that assigns)."""
        return not all(map(operator.is_, map(dict.get, self._homes, self._names), self._found))

    def _find(self) -> None:
        """Find all parameters; one that replaced another takes on whether that was in training."""
        homes = enumerate(module._parameters for module in self._modules)
        found = {(i, name): p for i, home in homes for name, p in home.items() if p is not None}
        thawed = {id(parameter) for parameter in self._thawed}
        now = {id(found[place]) for place, p in self._parameters.items() if id(p) in thawed and place in found}
        self._parameters, self.moved = found, False
        self._homes = [self._modules[i]._parameters for i, _ in found]
        self._names, self._found = [name for _, name in found], [*found.values()]
        self._distinct = list({id(parameter): parameter for parameter in found.values()}.values())
        self._thawed = [parameter for parameter in self._distinct if id(parameter) in now]


class BufferGuard:
    """Puts back buffers that a forward wrote while deltas were attached (spectral norm, moving averages)."""

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        self._modules = list(modules)
        self._homes = [module._buffers for module in self._modules]
        self._kept: list[tuple[dict[str, Any], str, Tensor, Tensor]] = []
        """What is put back: (module's buffers, name, the buffer, a copy of it)."""
        self._counted: list[Tensor] = []
        """The buffers that count their writes."""
        self._versions: list[int] = []
        """Counts of writes of those buffers when their copies were made."""
        self.moved = False
        """Whether buffers may have been moved, cast or copied since they were watched."""

    def watch(self) -> None:
        """Remember all buffers; copies are made anew only of those written since the last time."""
        if self.moved:
            self._homes, self._counted, self._versions = [module._buffers for module in self._modules], [], []
        homes = list(filter(None, self._homes))
        versions = dict(zip(map(id, self._counted), self._versions, strict=True))
        copies = {id(buffer): copy for _, _, buffer, copy in self._kept}
        kept = []
        for home in homes:
            for name, buffer in home.items():
                if buffer is None:
                    continue
                current = not buffer.is_inference() and versions.get(id(buffer)) == buffer._version
                copy = copies[id(buffer)] if current else buffer.detach().clone()
                kept.append((home, name, buffer, copy))
        self._keep(kept)

    def restore(self) -> None:
        """Make every buffer what it was, object and bits; what was moved or cast meanwhile stays so."""
        if self.moved:
            self._follow()
        for home, name, buffer, _ in self._kept:
            home[name] = buffer
        if [buffer._version for buffer in self._counted] != self._versions or len(self._counted) < len(self._kept):
            versions = dict(zip(map(id, self._counted), self._versions, strict=True))
            for _, _, buffer, copy in self._kept:
                # Tensors made under inference_mode keep no count of writes, and are written there only.
                if buffer.is_inference():
                    with torch.inference_mode():
                        buffer.copy_(copy)
                elif buffer._version != versions[id(buffer)]:
                    with torch.no_grad():
                        buffer.copy_(copy)
            self._versions = [buffer._version for buffer in self._counted]

    def loaded(self) -> None:
        """Keep what a load made of persistent buffers."""
        if self.moved:
            self._follow()
        versions = dict(zip(map(id, self._counted), self._versions, strict=True))
        passing = {id(module._buffers): module._non_persistent_buffers_set for module in self._modules}
        kept = []
        for home, name, buffer, copy in self._kept:
            now = home.get(name)
            if now is not None and name not in passing[id(home)]:
                versions.pop(id(buffer), None)
                buffer, copy = now, now.detach().clone()
            kept.append((home, name, buffer, copy))
        self._keep(kept)
        self._versions = [versions.get(id(buffer), buffer._version) for buffer in self._counted]

    def kept(self) -> list[tuple[dict[str, Any], str, Tensor, Tensor]]:
        """Return what was kept of each buffer: (module's buffers, name, the buffer, its value when it was watched)."""
        if self.moved:
            self._follow()
        return self._kept

    def _keep(self, kept: list[tuple[dict[str, Any], str, Tensor, Tensor]]) -> None:
        self._kept = kept
        self._counted = [buffer for _, _, buffer, _ in kept if not buffer.is_inference()]
        self._versions = [buffer._version for buffer in self._counted]
        self.moved = False

    def _follow(self) -> None:
        """Watch the buffers that came of a move or a cast in place of the old ones, with what was kept of these."""
        indices = {id(home): index for index, home in enumerate(self._homes)}
        self._homes = [module._buffers for module in self._modules]
        kept = []
        for old_home, name, buffer, copy in self._kept:
            home = self._homes[indices[id(old_home)]]
            now = home.get(name)
            if now is not None and (now.dtype != buffer.dtype or now.device != buffer.device):
                buffer, copy = now, copy.to(now)
            kept.append((home, name, buffer, copy))
        self._keep(kept)
        self._versions = [-1] * len(self._counted)  # Which of them were written is unknown.
