"""Keeping the backbone's statistics and training flags as they are while deltas are attached."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable
from typing import Any

from torch import nn

from deltaspec.backbone.stand_in import stand_in
from deltaspec.diagnostics.findings import DeltaSpecError, Diagnostic


def tracks_statistics(module: nn.Module) -> bool:
    """Return whether a module writes running statistics in training mode."""
    return isinstance(module, nn.modules.batchnorm._NormBase) and module.running_mean is not None


class FrozenStatistics:
    """A BatchNorm's own forward, in evaluation mode whatever the model's mode is.

    The running statistics belong to the backbone. If training one delta moved them, every other delta's output, and the
    detached backbone's, would move too.
    """

    def __init__(self, module: nn.Module, fqn: str = "", put_on: Callable[..., Any] | None = None) -> None:
        """`put_on` is the forward that others put onto the module, if there is one."""
        self.module, self.fqn, self.put_on = module, fqn, put_on

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the norm on its running statistics.

        Raises DeltaSpecError (DS414) in training mode where a forward was put onto the module: no copy of it runs that.
        """
        if self.put_on is not None:
            if self.module.training:
                raise DeltaSpecError([_would_move(self.fqn)])
            return self.put_on(*args, **kwargs)
        shadow = stand_in(self.module, {})
        shadow.training = False
        return shadow.forward(*args, **kwargs)


def _would_move(fqn: str) -> Diagnostic:
    message = f"{fqn} is in training mode, and a forward that was put onto it would move the backbone's statistics"
    hint = "put it into evaluation mode, .eval(), or take the forward off before compiling"
    return Diagnostic("DS414", message, suggestion=hint)


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
        self.frozen = False
        """Whether all are out of training, or about to be."""
        self.moved = True
        """Whether parameters may have been replaced (cast, loaded, copied) since they were found."""

    def freeze(self) -> None:
        """Freeze all, and remember which were in training."""
        if self.moved or self._is_stale():
            self._find()
        if not self.frozen:  # else this was interrupted
            self._thawed = [parameter for parameter in self._distinct if parameter.requires_grad]
        self.frozen = True
        for parameter in self._thawed:
            parameter.requires_grad = False

    def thaw(self) -> None:
        """Put those back that were in."""
        for parameter in self.thawed():
            parameter.requires_grad = True
        self.frozen, self._thawed = False, []

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
