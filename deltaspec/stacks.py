"""Stacks: the storage of many alike deltas, one row of memory a delta.

Deltas of one *kind* (method, sites, params, shapes) differ in their values alone. Their tensors live in rows of one
matrix; a tensor of the kind is a slice of its columns, `[capacity + 1, *shape]`, of which each row is contiguous. Row 0
is zeros and stands for "no delta". The stack is the storage: a delta's parameters stay the objects they are (optimizers
hold them) and become views of its row, so nothing is held twice.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any
from weakref import WeakValueDictionary

import torch

from deltaspec.stacks_rows import Layout, Stack

if TYPE_CHECKING:
    from deltaspec.deltas import Delta, Deltas
    from deltaspec.planned import PlannedDelta, PlannedSite


__all__ = ["Kind", "Stack", "Stacks", "kind_of"]


class Kind:
    """Deltas that differ in their values alone. Two kinds of the same content are one object."""

    __slots__ = ("__weakref__", "content", "method", "sites")

    def __init__(self, method: str, sites: tuple[PlannedSite, ...], content: tuple[Any, ...]) -> None:
        self.method, self.sites, self.content = method, sites, content

    def __repr__(self) -> str:
        return f"Kind({self.method}, {len(self.sites)} sites)"


_KINDS: WeakValueDictionary[tuple[Any, ...], Kind] = WeakValueDictionary()


def kind_of(planned: PlannedDelta) -> Kind:
    """Give a planned delta's kind. It looks at all sites; `Stacks.kind` remembers."""
    sites = tuple(
        (
            site.site.row.fqn,
            site.site.parameter,
            site.site.host,
            site.params,
            tuple((spec.name, spec.shape, spec.dtype, spec.buffer, spec.key, spec.stack) for spec in site.tensors),
        )
        for site in planned.sites
    )
    content = (planned.method, sites)
    found = _KINDS.get(content)
    if found is None:
        found = _KINDS[content] = Kind(planned.method, planned.sites, content)
    return found


class Stacks:
    """The stacks of one backbone's deltas. A delta is stacked when something asks for it (`ensure`), not before."""

    def __init__(self, deltas: Deltas, planned: Mapping[str, PlannedDelta]) -> None:
        self._deltas, self._planned = deltas, planned
        self._kinds: dict[int, tuple[tuple[PlannedSite, ...], Kind]] = {}
        self._stacks: dict[Kind, list[Stack]] = {}
        self._of: dict[str, Stack] = {}
        self._pointers: dict[str, tuple[int, ...]] = {}
        """Where the tensors of a stacked delta lay when they became views of its row."""
        self.generation = 0
        """Counts how often rows of any stack were moved: `Stack.tensors` are then new ones."""

    def kind(self, name: str) -> Kind:
        """Give a delta's kind; of deltas that share one tuple of sites, one is looked at."""
        planned = self._planned[name]
        found = self._kinds.get(id(planned.sites))
        if found is None or found[1].method != planned.method:
            found = self._kinds[id(planned.sites)] = planned.sites, kind_of(planned)
        return found[1]

    def stack(self, kind: Kind) -> Stack:
        """Give the stack of a kind (the latest, where its deltas differ in dtype or device); KeyError without one."""
        return self._stacks[kind][-1]

    def of(self, name: str) -> Stack:
        """Give the stack that holds a delta, which `ensure` was asked for."""
        return self._of[name]

    def ensure(self, names: Iterable[str]) -> None:
        """Stack deltas that are not stacked, or whose tensors were moved, cast or replaced since."""
        missing = [name for name in names if not self._is_current(name)]
        if not missing:
            return
        self.sweep()
        stacks: dict[Stack, list[str]] = {}
        for name in dict.fromkeys(missing):
            stacks.setdefault(self._fitting(name), []).append(name)
        for stack, added in stacks.items():
            self._make_room(stack, len(added))
            for name in added:
                self._adopt(name, stack)

    def sweep(self) -> None:
        """Forget the rows of deltas whose tensors are elsewhere by now; stacks without deltas go."""
        for name in [name for name in self._of if not self._is_current(name)]:
            stack = self._of.pop(name)
            del self._pointers[name]
            stack.release(name, again=False)
        for kind, stacks in list(self._stacks.items()):
            self._stacks[kind] = [stack for stack in stacks if stack.names]
            if not self._stacks[kind]:
                del self._stacks[kind]

    def _is_current(self, name: str) -> bool:
        return self._pointers.get(name) == _pointers(self._deltas[name])

    def _fitting(self, name: str) -> Stack:
        """Give the stack for a delta's tensors, made if there is none."""
        layout = Layout.of(dict(self._deltas[name].tensors()))
        stacks = self._stacks.setdefault(self.kind(name), [])
        found = next((stack for stack in stacks if stack.signature == layout.signature), None)
        if found is None:
            found = Stack(layout)
            stacks.append(found)
        return found

    def _make_room(self, stack: Stack, more: int) -> None:
        if stack.make_room(more):
            self.generation += 1
            for name in stack.names:
                self._bind(name, stack)

    @torch.no_grad()
    def _adopt(self, name: str, stack: Stack) -> None:
        row = stack.take(name)
        for key, tensor in self._deltas[name].tensors():
            stack.tensors[key][row].copy_(tensor)
        self._of[name] = stack
        self._bind(name, stack)

    def _bind(self, name: str, stack: Stack) -> None:
        """Make a delta's tensors views of its row; the objects stay."""
        delta, row = self._deltas[name], stack.names[name]
        for key, tensor in delta.tensors():
            tensor.data = stack.view(key, row)
        self._pointers[name] = _pointers(delta)


def _pointers(delta: Delta) -> tuple[int, ...]:
    values = [*delta._parameters.values(), *delta._buffers.values()]
    return tuple([value.data_ptr() for value in values if value is not None])
