"""Stacks: the storage of many alike deltas, one row of memory a delta.

Deltas of one *kind* (method, sites, params, shapes) differ in their values alone. Their tensors live in rows of one
matrix; a tensor of the kind is a slice of its columns, `[capacity + 1, *shape]`, of which each row is contiguous. Row 0
is zeros and stands for "no delta". The stack is the storage: a delta's parameters stay the objects they are (optimizers
hold them) and become views of its row, so nothing is held twice.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Container, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn

from deltaspec.deltas.modules import Delta, Deltas, attribute_name
from deltaspec.deltas.stack import Layout, Stack
from deltaspec.deltas.watched import Displaced, stacked, unwatch, watch
from deltaspec.diagnostics.findings import DeltaSpecError, Diagnostic
from deltaspec.planning.planned import PlannedDelta, PlannedSite


@dataclass(frozen=True, eq=False, slots=True, weakref_slot=True)
class Kind:
    """Deltas that differ in their values alone. Two kinds of the same content are one object."""

    method: str
    sites: tuple[PlannedSite, ...] = field(repr=False)
    content: tuple[Any, ...] = field(repr=False)


_KINDS: WeakValueDictionary[tuple[Any, ...], Kind] = WeakValueDictionary()


def kind_of(planned: PlannedDelta) -> Kind:
    """Return a planned delta's kind. It looks at all sites; `Stacks.kind` remembers."""
    sites = []
    for part in planned.sites:
        tensors = tuple((s.name, s.shape, s.dtype, s.buffer, s.key, s.stack) for s in part.tensors)
        sites.append((part.site.row.fqn, part.site.parameter, part.site.host, part.params, tensors))
    content = (planned.method, tuple(sites))
    found = _KINDS.get(content)
    if found is None:
        found = _KINDS[content] = Kind(planned.method, planned.sites, content)
    return found


class Stacks:
    """The stacks of one backbone's deltas.

    Its own deltas, which are modules, are stacked when something asks for it (`ensure`). Others are *held*: they are a
    row and nothing else, until something wants tensors of them (`show`).
    """

    def __init__(
        self,
        deltas: Deltas,
        planned: Mapping[str, PlannedDelta],
        is_read: Callable[[], bool] = lambda: False,
        is_idle: Callable[[], bool] = lambda: True,
    ) -> None:
        self._deltas, self._planned = deltas, planned
        self.home = deltas
        """The modules of the first view; those of others have the same tensors."""
        self.is_read = is_read
        """Tells whether other threads may be reading the deltas' memory now."""
        self.is_idle = is_idle
        """Tells whether none does."""
        self._left: tuple[list[Tensor], list[Tensor]] = [], []
        """Memory that tensors lay in before they moved here, lately and before that: a kernel may be reading it."""
        self._kinds: dict[int, tuple[tuple[PlannedSite, ...], Kind]] = {}
        self._stacks: dict[Kind, list[Stack]] = {}
        self._kind_of: dict[Stack, Kind] = {}
        self._of: dict[str, Stack] = {}
        self._held: dict[str, Delta | None] = {}
        """Modules that show held deltas; None for those that no one asked for."""
        self.displaced = Displaced()
        """Parameters of watched deltas that are not those in the stacks, as a compiled graph takes them to be."""
        self._pointers: dict[str, tuple[int, ...]] = {}
        """Addresses of the tensors of a delta when they became views of its row."""

    def __deepcopy__(self, memo: dict[int, Any]) -> Stacks:
        """Copy with what is held; deltas that are modules are copied as such, and stacked anew when asked for."""
        twin = type(self)(copy.deepcopy(self._deltas, memo), copy.deepcopy(self._planned, memo))
        memo[id(self)] = twin
        for name in self._held:
            self.ensure([name])
            stack = self._of[name]
            layout = Layout.of({key: stack.tensors[key][0] for key in stack.layout.slots})
            copied, row = twin.hold(name, layout)
            for key in layout.slots:
                copied.tensors[key][row].copy_(stack.tensors[key][stack.names[name]])
        return twin

    def kind(self, name: str) -> Kind:
        """Return a delta's kind. Where deltas of one kind came to differ in dtype or device, each stack is a kind."""
        stack = self._of.get(name)
        return self._planned_kind(name) if stack is None else self._kind_of[stack]

    def _planned_kind(self, name: str) -> Kind:
        planned = self._planned[name]
        found = self._kinds.get(id(planned.sites))
        if found is None or found[1].method != planned.method:
            found = self._kinds[id(planned.sites)] = planned.sites, kind_of(planned)
        return found[1]

    def forget_kinds(self) -> None:
        """Forget the kinds of sites that no delta has any more."""
        left = {id(planned.sites) for planned in self._planned.values()}
        self._kinds = {key: kind for key, kind in self._kinds.items() if key in left}

    def of(self, name: str) -> Stack:
        """Return the stack that holds a delta, which `ensure` was asked for."""
        return self._of[name]

    def ensure(self, names: Iterable[str]) -> None:
        """Stack deltas that are not stacked, or whose tensors were moved, cast or replaced since."""
        missing = [name for name in names if not self._is_current(name)]
        if any(self._left) and self.is_idle():  # what runs from now on finds the tensors where they are now
            self._left = [], []
        if not missing:
            return
        self._settle()
        self.sweep()
        stacks: dict[Stack, list[str]] = {}
        for name in dict.fromkeys(missing):
            stacks.setdefault(self._fitting(name, Layout.of(dict(self._module(name).tensors()))), []).append(name)
        for stack, added in stacks.items():
            self._make_room(stack, len(added))
            for name in added:
                self._adopt(name, stack)

    def watch(self, deltas: Deltas) -> None:
        """Notice, in this view, when a stacked delta gets other parameters: compiled graphs have to be told."""
        for name in self._of:
            if (delta := deltas.get(name)) is not None:
                watch(delta, self.displaced)

    def discard(self, name: str) -> None:
        """Forget a delta that is a module, and goes for good; its tensors stay what they are, whoever holds them."""
        if (stack := self._of.pop(name, None)) is not None:
            del self._pointers[name]
            unwatch(self._module(name))
            self._release(stack, name, again=False)

    # Held deltas

    @torch.inference_mode(False)  # in a server's inference mode, what is made here could never be trained beside
    def hold(self, name: str, layout: Layout, more: int = 1, limit: int | None = None) -> tuple[Stack, int]:
        """Assign a delta a row, to be filled; room is made for `more` at once, `limit` as for `Stack.make_room`."""
        self._settle()
        stack = self._fitting(name, layout)
        self._make_room(stack, more, limit)
        self._of[name], self._held[name] = stack, None
        return stack, stack.take(name)

    @torch.inference_mode(False)
    def show(self, name: str, buffers: Container[str]) -> Delta:
        """Return a held delta as a module, whose tensors (frozen parameters, and `buffers`) are views of its row."""
        delta = self._held[name]
        if delta is None:
            stack = self._of[name]
            delta = self._held[name] = Delta(name)
            delta.train(self._deltas.training)
            for key in stack.layout.slots:
                value, attribute = stack.view(key, stack.names[name]), attribute_name(key)
                if key in buffers:
                    delta._buffers[attribute] = value
                else:
                    delta._parameters[attribute] = nn.Parameter(value, requires_grad=False)
            delta.own()
            self._pointers[name] = _pointers(delta)
        return delta

    @torch.inference_mode(False)
    def drop(self, name: str, *, again: bool) -> None:
        """Let go of a held delta; `again` as for `Stack.release`. A backward through it that is pending will raise."""
        delta, stack = self._held.pop(name), self._of.pop(name, None)
        if delta is not None:
            del self._pointers[name]
            if again:
                torch.autograd.graph.increment_version([tensor for _, tensor in delta.tensors()])
        if stack is not None:
            self._release(stack, name, again=again)

    def apply(self, fn: Callable[[Tensor], Tensor]) -> None:
        """Move or cast held deltas, as `nn.Module._apply` does with those that are modules."""
        self.sweep()
        for stack in {self._of[name] for name in self._held if name in self._of}:
            stack.move(fn)
            self._rebind(stack)
        for name, delta in self._held.items():
            if name not in self._of and delta is not None:  # a user gave it tensors of its own
                delta._apply(fn)  # type: ignore[no-untyped-call]

    def train(self, mode: bool) -> None:
        """Put the modules that show held deltas into training mode, or out of it."""
        for delta in self._held.values():
            if delta is not None:
                delta.train(mode)

    def settle_in(self, home: Deltas) -> dict[str, Delta]:
        """Use other modules of the same deltas; give those that show held ones: their modes are set elsewhere now."""
        self._deltas = self.home = home
        return {name: delta for name, delta in self._held.items() if delta is not None}

    def held_rows(self) -> list[Tensor]:
        """Return the matrices that held deltas lie in."""
        return [flat for stack in {self._of[name] for name in self._held if name in self._of} for flat in stack.flats]

    # Rows

    def _settle(self) -> None:
        """Let go of memory that was left before the last time that tensors moved: no kernel runs that long."""
        self._left = ([], self._left[0]) if self.is_read() else ([], [])

    def sweep(self) -> None:
        """Forget the rows of deltas whose tensors are elsewhere by now."""
        for name in [name for name in self._of if not self._is_current(name)]:
            del self._pointers[name]
            self._release(self._of.pop(name), name, again=False)

    def _release(self, stack: Stack, name: str, *, again: bool) -> None:
        stack.release(name, again=again)
        if not stack.names:  # it stays, without memory: whoever reads it finds what it holds next
            stack.empty()

    def _module(self, name: str) -> Delta:
        delta = self._held.get(name)
        return self._deltas[name] if delta is None else delta

    def _is_current(self, name: str) -> bool:
        if name in self._held and self._held[name] is None:
            return True
        module = self._module(name)
        if module.is_displaced():
            if name in self._held or (name not in self._pointers and torch._C._are_functorch_transforms_active()):
                raise DeltaSpecError([_displaced(name)])
            return name in self._pointers  # what stands there is read from there, and is never taken into the stack
        return name in self._pointers and self._pointers[name] == _pointers(module)

    def _fitting(self, name: str, layout: Layout) -> Stack:
        """Return the stack for a delta's tensors, made if there is none."""
        kind = self._planned_kind(name)
        stacks = self._stacks.setdefault(kind, [])
        signature = layout.signature(layout.places)
        now = ((stack, [(flat.dtype, flat.device) for flat in stack.flats]) for stack in stacks)
        found = next((stack for stack, places in now if stack.layout.signature(places) == signature), None)
        if found is None:
            found = Stack(layout)
            own = Kind(kind.method, kind.sites, (kind.content, signature)) if stacks else kind
            self._kind_of[found] = own
            stacks.append(found)
        return found

    def _make_room(self, stack: Stack, more: int, limit: int | None = None) -> None:
        if stack.make_room(more, limit):
            self._rebind(stack)

    def _rebind(self, stack: Stack) -> None:
        for name in stack.names:
            if name in self._pointers:
                self._bind(name, stack)

    @torch.no_grad()
    def _adopt(self, name: str, stack: Stack) -> None:
        row, module = stack.take(name), self._module(name)
        for key, tensor in () if module.is_displaced() else module.tensors():
            stack.tensors[key][row].copy_(tensor)
        self._of[name] = stack
        self._bind(name, stack)

    def _bind(self, name: str, stack: Stack) -> None:
        """Make a delta's tensors views of its row; the objects stay."""
        delta, row = self._module(name), stack.names[name]
        if delta.is_displaced():  # its own are not at hand: they are taken in once they are back
            self._pointers[name] = ()
            return
        is_read = self.is_read()
        for key, tensor in delta.tensors():
            if is_read:
                self._left[0].append(tensor.data)
            tensor.data = stack.view(key, row)
        self._pointers[name] = _pointers(delta)
        stacked(delta)


def _displaced(name: str) -> Diagnostic:
    message = f"delta {name!r} has other tensors than its own (functional_call, a parametrization), and is in no stack"
    hint = f"run a batch with deltas=[{name!r}, …] once before, or run its rows apart, under c.only({name!r})"
    return Diagnostic("DS441", message, suggestion=hint)


def _pointers(delta: Delta) -> tuple[int, ...]:
    values = [*delta._parameters.values(), *delta._buffers.values()]
    return tuple([value.data_ptr() for value in values if value is not None])
