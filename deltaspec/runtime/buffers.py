"""Keeping what a forward may write in the backbone as it is while deltas are attached: buffers, some parameters."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from deltaspec.backbone.writes import is_published, writes_uncounted


class Kept(NamedTuple):
    """A tensor as it is when nothing is attached."""

    number: int
    """Number of its module."""
    home: dict[str, Any]
    """Registry of the module that holds it: its buffers, or its parameters."""
    name: str
    tensor: Tensor
    value: Tensor
    """A copy of it."""


class BufferGuard:
    """Puts back buffers that a forward wrote while deltas were attached (spectral norm, moving averages).

    Torch counts the writes to a tensor. Where a forward may write past that count (BatchNorm's kernel, `.data`, numpy),
    values are compared: those of a module that has one counted write, and of all whose code names such a way.
    """

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        self._modules = list(modules)
        self._homes = [module._buffers for module in self._modules]
        self._slipping: set[int] | None = None
        """Numbers of the modules in which something may be written without being counted; None: not looked for yet."""
        self._open: list[int] = []
        """Numbers of the modules that may register buffers in a forward."""
        self._written: dict[tuple[int, str], None] = {}
        """Parameters that forwards write: (number of the module, name)."""
        self._kept: list[Kept] = []
        self._absent: list[tuple[dict[str, Any], str]] = []
        """Buffers that are registered, and are not there: (module's buffers, name)."""
        self._compared: list[Kept] = []
        """What is compared by value."""
        self._counted: list[Tensor] = []
        """Tensors that count their writes; those made under inference_mode do not."""
        self._versions: list[int] = []
        """Counts of writes of those when their copies were made."""
        self._lengths: list[int] | None = None
        """Numbers of buffers of the modules that have some, when they were watched; None: never yet."""
        self.moved = False
        """Whether buffers may have been moved, cast or copied since they were watched."""

    def watch(self) -> None:
        """Remember all buffers; copies are made anew only of those written since the last time."""
        if self._is_current():
            return
        self._look()
        if self.moved:
            self._homes = [module._buffers for module in self._modules]
            self._counted, self._versions = [], []
        versions = dict(zip(map(id, self._counted), self._versions, strict=True))
        values = {id(one.tensor): one.value for one in self._kept}
        kept, self._absent = list[Kept](), []
        for index, home in enumerate(self._homes):
            if home:
                present = {name: buffer for name, buffer in home.items() if buffer is not None}
                self._absent += [(home, name) for name in home if name not in present]
                current = all(versions.get(id(buffer)) == buffer._version for buffer in present.values()
                              if not buffer.is_inference())  # fmt: skip
                for name, buffer in present.items():
                    value = values.get(id(buffer)) if current and not buffer.is_inference() else None
                    kept.append(self._keep(index, home, name, value))
        kept += [self._keep(index, self._modules[index]._parameters, name, None) for index, name in self._written]
        self._take(kept)
        self._lengths = [*map(len, filter(None, self._homes))]

    def _is_current(self) -> bool:
        """Return whether all is as it was watched, as far as that is quick to see."""
        return (
            not self.moved
            and not self._compared
            and [*map(len, filter(None, self._homes))] == self._lengths
            and [id(one.home.get(one.name)) for one in self._kept] == [id(one.tensor) for one in self._kept]
            and len(self._counted) == len(self._kept)
            and [tensor._version for tensor in self._counted] == self._versions
            and all(home.get(name) is None for home, name in self._absent)
        )

    def restore(self) -> None:
        """Make every buffer what it was, object and bits; what was moved or cast meanwhile stays so."""
        if self.moved:
            self._follow()
        for _, home, name, tensor, _ in self._kept:
            home[name] = tensor
        for home, name in self._absent:
            home[name] = None
        if self._open:
            self._close()
        if [tensor._version for tensor in self._counted] != self._versions or len(self._counted) < len(self._kept):
            versions = dict(zip(map(id, self._counted), self._versions, strict=True))
            counted = (one for one in self._kept if not one.tensor.is_inference())
            homes = {id(one.home) for one in counted if versions[id(one.tensor)] != one.tensor._version}
            for one in self._kept:
                if id(one.home) in homes or one.tensor.is_inference():
                    _write(one)
            self._versions = [tensor._version for tensor in self._counted]
        for one in self._compared:
            if not _is_same(one.tensor, one.value):
                _write(one)
                self._versions = [tensor._version for tensor in self._counted]

    def loaded(self) -> None:
        """Keep what a load made of persistent buffers."""
        if self.moved:
            self._follow()
        versions = dict(zip(map(id, self._counted), self._versions, strict=True))
        passing = {id(module._buffers): module._non_persistent_buffers_set for module in self._modules}
        kept = []
        for one in self._kept:
            now = one.home.get(one.name)
            if now is not None and one.name not in passing.get(id(one.home), ()):
                versions.pop(id(one.tensor), None)
                one = one._replace(tensor=now, value=now.detach().clone())
            kept.append(one)
        self._take(kept)
        self._versions = [versions.get(id(tensor), tensor._version) for tensor in self._counted]

    def wrote(self, module: nn.Module, name: str, before: Tensor) -> None:
        """Watch a parameter, too, that a forward writes; it had this value before."""
        index = next(index for index, other in enumerate(self._modules) if other is module)
        self._written[index, name] = None
        parameter = module._parameters[name]
        assert parameter is not None
        self._kept.append(Kept(index, module._parameters, name, parameter, before))
        self._counted.append(parameter)
        self._versions.append(parameter._version)
        self._compared.append(self._kept[-1])

    def kept(self) -> Iterator[tuple[nn.Module, str, Tensor, Tensor]]:
        """Yield what was kept: (module, name, the buffer or parameter, its value when it was watched)."""
        if self.moved:
            self._follow()
        for index, _, name, tensor, value in self._kept:
            yield self._modules[index], name, tensor, value

    def _look(self) -> None:
        """Find the modules whose forwards go their own ways with buffers: once."""
        if self._slipping is None:
            numbers = {id(module): index for index, module in enumerate(self._modules)}
            inside = (below for module in self._modules if writes_uncounted(module) for below in module.modules())
            self._slipping = {numbers[id(module)] for module in inside if id(module) in numbers}
            self._open = [index for index, module in enumerate(self._modules) if not is_published(module)]

    def _keep(self, index: int, home: dict[str, Any], name: str, value: Tensor | None) -> Kept:
        """Keep a tensor with a copy: the one there was, where it is good still."""
        tensor: Tensor = home[name]
        if value is None or (self._slips(index, home) and not _is_same(tensor, value)):
            value = tensor.detach().clone()
        return Kept(index, home, name, tensor, value)

    def _slips(self, index: int, home: dict[str, Any]) -> bool:
        assert self._slipping is not None
        return index in self._slipping or home is not self._homes[index]

    def _take(self, kept: list[Kept]) -> None:
        self._look()
        self._kept = kept
        self._compared = [one for one in kept if self._slips(one.number, one.home)]
        self._counted = [one.tensor for one in kept if not one.tensor.is_inference()]
        self._versions = [tensor._version for tensor in self._counted]
        self.moved = False

    def _close(self) -> None:
        """Take out the buffers that a forward registered."""
        known = {(id(home), name) for _, home, name, *_ in self._kept}
        known |= {(id(home), name) for home, name in self._absent}
        for index in self._open:
            module, home = self._modules[index], self._homes[index]
            for name in [name for name in home if (id(home), name) not in known]:
                del home[name]
                module._non_persistent_buffers_set.discard(name)

    def _follow(self) -> None:
        """Watch the buffers that came of a move or a cast in place of the old ones, with what was kept of these."""
        old, self._homes = self._homes, [module._buffers for module in self._modules]
        numbers = {id(home): index for index, home in enumerate(old)}
        kept = []
        for one in self._kept:
            home = self._homes[one.number] if one.home is old[one.number] else self._modules[one.number]._parameters
            now, tensor, value = home.get(one.name), one.tensor, one.value
            if now is not None and (now.dtype != tensor.dtype or now.device != tensor.device):
                tensor, value = now, _moved(value, now)
            kept.append(Kept(one.number, home, one.name, tensor, value))
        self._absent = [(self._homes[numbers[id(home)]], name) for home, name in self._absent]
        self._take(kept)
        self._versions = [-1] * len(self._counted)  # Which of them were written is unknown.


def _moved(value: Tensor, now: Tensor) -> Tensor:
    """Return what was kept of a tensor in the form that it has now. A model may be on the meta device in between."""
    if value.is_meta:
        return now.detach().clone()
    return value.to(now.dtype) if now.is_meta else value.to(now)


def _is_same(tensor: Tensor, value: Tensor) -> bool:
    return tensor.is_meta or torch.equal(tensor, value)


def _write(one: Kept) -> None:
    """Give a tensor the value that was kept. Those made under inference_mode are written there only."""
    with torch.inference_mode() if one.tensor.is_inference() else torch.no_grad():
        one.tensor.copy_(one.value)
