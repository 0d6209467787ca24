"""Deltas that act nowhere require no gradients, for whoever asks: flags are set when someone looks, not at a switch.

Setting the flags of all parameters would cost a switch several times what else it costs. So they are set when a model
is asked for its parameters, and put back by the next switch. A backward through what ran before finds them: a hook
puts the flag of a parameter back before its gradient comes, which else would be lost.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable

from torch import Tensor, nn
from torch.utils.hooks import unserializable_hook

from deltaspec.deltas.modules import Delta, Deltas


@unserializable_hook
class _Waking:
    """The hook of a parameter that is idle."""

    def __init__(self, parameter: nn.Parameter) -> None:
        self._parameter = weakref.ref(parameter)

    def __call__(self, gradient: Tensor) -> None:
        if (parameter := self._parameter()) is not None:
            parameter.requires_grad = True


class Idle:
    """The deltas whose parameters are out of training for as long as they act nowhere."""

    def __init__(self, names: Iterable[str] = ()) -> None:
        self.names = set(names)

    def rest(self, delta: Delta) -> None:
        """Take a delta's parameters out of training."""
        resting = delta.own_tensors.resting
        for name, parameter in delta._parameters.items():
            if parameter is None or not parameter.requires_grad or not parameter.is_leaf:
                continue
            if name not in resting:
                resting[name] = parameter.register_hook(_Waking(parameter))  # type: ignore[no-untyped-call]
            parameter.requires_grad = False
        if resting:
            self.names.add(delta.name)

    def wake(self, containers: Iterable[Deltas]) -> None:
        """Put all back into training that were in: what stands in their places now, where others replaced them."""
        names, self.names = self.names, set()
        found = [delta for deltas in containers for name in names if (delta := deltas.get(name)) is not None]
        for delta in found:
            for name in delta.own_tensors.resting:
                parameter = delta._parameters.get(name)
                if parameter is not None and parameter.is_leaf:
                    parameter.requires_grad = True
        for delta in found:
            delta.own_tensors.forget_resting()
