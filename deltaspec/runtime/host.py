"""The backbone of one view, as it is without any delta: what is put in and taken out by those above."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Self

from torch import Tensor, nn

from deltaspec.backbone.copying import copy_held
from deltaspec.backbone.forwards import foreign_part
from deltaspec.backbone.reserved import home
from deltaspec.backbone.walk import named
from deltaspec.deltas.modules import Deltas
from deltaspec.runtime.buffers import BufferGuard
from deltaspec.runtime.forward_gate import ForwardGate
from deltaspec.runtime.frozen import Flags, FrozenStatistics, tracks_statistics
from deltaspec.runtime.pickled_alone import mark
from deltaspec.runtime.sockets import Forward, Socket
from deltaspec.runtime.untrained import Untrained


class Host:
    """A backbone clone: its modules, their own forwards, training flags and buffers, and the gate of its forwards."""

    def __init__(
        self,
        backbone: nn.Module,
        deltas: Deltas,
        sockets: Mapping[int, Socket] | None = None,
        *,
        trained: bool = False,
    ) -> None:
        """`sockets` are those that wrappers of other libraries lead to already, by id of their module."""
        self.backbone, self.deltas, self.trained = backbone, deltas, trained
        """`trained`: the backbone has weights of its own, and may be trained while nothing is attached."""
        self.home = home(backbone)
        """FQN of the deltas."""
        self.sockets: dict[int, Socket] = dict(sockets or {})
        """The places of the forwards that deltas ever needed, by id of their module."""
        for socket in self.sockets.values():
            mark(socket.module)
        self.gate = ForwardGate()
        self._came: set[str] = set()
        """FQNs of modules that were put there after all else."""
        self._take(self.current_modules())
        self._untrained = None if trained else Untrained(self.modules)

    def _take(self, modules: dict[str, nn.Module]) -> None:
        self.modules = modules
        """All modules but the deltas, by FQN."""
        self.statistics = [fqn for fqn, module in modules.items() if tracks_statistics(module)]
        """FQNs of the modules that write running statistics."""
        self.flags, self.buffers = Flags(modules.values()), BufferGuard(modules.values())

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """Copy together with the backbone."""
        twin = memo[id(self)] = type(self).__new__(type(self))
        for name, value in self.__dict__.items():
            twin.__dict__[name] = copy_held(value, self.backbone, memo)
        twin.sockets = {id(socket.module): socket for socket in twin.sockets.values()}
        twin.follow_moves()
        return twin

    def current_modules(self) -> dict[str, nn.Module]:
        """Return all modules of the backbone as it is now but the deltas, by FQN."""
        return dict(named(self.backbone, but=self.home))

    def adopt(self, modules: dict[str, nn.Module], *, acts: bool) -> None:
        """Take these for the backbone's modules, where others took the place of some; `acts`: deltas are attached."""
        self._came = self.came_later()
        self.buffers.restore()
        self.flags.thaw()
        kept = {id(module) for module in modules.values()}
        self.sockets = {place: socket for place, socket in self.sockets.items() if place in kept}
        if self._untrained is not None:
            self._untrained.leave(modules, self.modules)
        self._take(modules)
        if acts:
            self.freeze()

    def came_later(self) -> set[str]:
        """Return the FQNs of modules that others put into the backbone since it was made."""
        return self._came | {n for n, module in self.current_modules().items() if self.modules.get(n) is not module}

    def socket(self, fqn: str) -> Socket:
        """Return the place of a module's forward. A module that stands in two places of the model has one."""
        module = self.modules[fqn]
        if (found := self.sockets.get(id(module))) is None:
            found = self.sockets[id(module)] = Socket(module)
            mark(module)
        return found

    def has_foreign(self, fqn: str) -> bool:
        """Return whether a module has a forward of another library, beneath the deltas or around them."""
        module = self.modules[fqn]
        top, socket = module.__dict__.get("forward"), self.sockets.get(id(module))
        return top is not None if socket is None or top is not socket.call else socket.original is not None

    def own_forward(self, fqn: str) -> Forward:
        """Return the forward that a module has without any delta."""
        return self.socket(fqn).idle

    def frozen_statistics(self, fqn: str) -> Forward:
        """Return the forward of a module that writes running statistics, such that it does not."""
        module, original = self.modules[fqn], self.socket(fqn).original
        return FrozenStatistics(module, fqn, original if foreign_part(module, original) is not None else None)

    def freeze(self) -> None:
        """Take the backbone's parameters out of training, and remember the values of its buffers."""
        self.buffers.watch()
        self.flags.freeze()

    def follow_moves(self) -> None:
        """Look for parameters and buffers anew, which may have been moved, cast or replaced."""
        self.flags.moved = self.buffers.moved = True
        if self._untrained is not None:
            self._untrained.follow(self.modules)

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
