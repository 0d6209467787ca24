"""The backbone of one view, as it is without any delta: what is put in and taken out by those above."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Self

from torch import Tensor, nn

from deltaspec.backbone.copying import copy_held
from deltaspec.backbone.forwards import foreign_part, own_forward
from deltaspec.backbone.reserved import home
from deltaspec.backbone.walk import named
from deltaspec.deltas.modules import Deltas
from deltaspec.runtime.buffers import BufferGuard
from deltaspec.runtime.forward_gate import ForwardGate
from deltaspec.runtime.frozen import Flags, FrozenStatistics, tracks_statistics
from deltaspec.runtime.program import Forward


class Host:
    """A backbone clone: its modules, their own forwards, training flags and buffers, and the gate of its forwards."""

    def __init__(self, backbone: nn.Module, deltas: Deltas) -> None:
        self.backbone, self.deltas = backbone, deltas
        self.home = home(backbone)
        """FQN of the deltas."""
        self.modules = dict(named(backbone, but=self.home))
        """All modules but the deltas, by FQN."""
        self.originals: dict[str, Forward | None] = {n: m.__dict__.get("forward") for n, m in self.modules.items()}
        """Instance-level forwards of other libraries' hooks, by FQN; None where a module has none."""
        self.statistics = [fqn for fqn, module in self.modules.items() if tracks_statistics(module)]
        """FQNs of the modules that write running statistics."""
        self.gate = ForwardGate()
        self.flags, self.buffers = Flags(self.modules.values()), BufferGuard(self.modules.values())

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """Copy together with the backbone."""
        twin = memo[id(self)] = type(self).__new__(type(self))
        for name, value in self.__dict__.items():
            twin.__dict__[name] = copy_held(value, self.backbone, memo)
        twin.follow_moves()
        return twin

    def own_forward(self, fqn: str) -> Forward:
        """Return the forward that a module has without any delta."""
        return self.originals[fqn] or own_forward(self.modules[fqn])

    def frozen_statistics(self, fqn: str) -> Forward:
        """Return the forward of a module that writes running statistics, such that it does not."""
        module = self.modules[fqn]
        original = self.originals[fqn]
        return FrozenStatistics(module, fqn, original if foreign_part(module, original) is not None else None)

    def freeze(self) -> None:
        """Take the backbone's parameters out of training, and remember the values of its buffers."""
        self.buffers.watch()
        self.flags.freeze()

    def follow_moves(self) -> None:
        """Look for parameters and buffers anew, which may have been moved, cast or replaced."""
        self.flags.moved = self.buffers.moved = True

    def kept_buffers(self) -> Iterator[tuple[str, str, Tensor, Tensor]]:
        """Yield what buffers will be when nothing is attached: (module's FQN, name, the buffer, its value).

        And what parameters will be that forwards write.
        """
        names = {id(module): fqn for fqn, module in self.modules.items()}
        for module, name, tensor, value in self.buffers.kept():
            yield names[id(module)], name, tensor, value

    def trained_in_backbone(self) -> set[str]:
        """Return the names of the backbone parameters that are in training whenever nothing is attached."""
        thawed = {id(p) for p in self.flags.thawed()}
        return {name for name, p in self.backbone.named_parameters() if id(p) in thawed}
