"""What the views of one model share: its deltas and all that is known of them, whatever is attached."""

from __future__ import annotations

import copy
import gc
import threading
import weakref
from collections.abc import Iterable
from dataclasses import replace
from typing import Any, Self

import torch

from deltaspec.backbone.recorder import Observation
from deltaspec.deltas.modules import Deltas
from deltaspec.deltas.stacks import Stacks
from deltaspec.diagnostics.findings import DeltaSpecError, Diagnostic
from deltaspec.language.model import DeltaSpec
from deltaspec.methods.registry import methods
from deltaspec.planning.conflicts import Rivals
from deltaspec.planning.plan import Plan
from deltaspec.planning.planned import PlannedDelta
from deltaspec.runtime.forks import guard
from deltaspec.runtime.host import Host
from deltaspec.runtime.placements import Placements
from deltaspec.runtime.ports import View
from deltaspec.runtime.proving import refuse_bypassed, refuse_unread


class Shared:
    """The deltas that several views have in common: planned, ordered, stacked. Views are equals, and come and go.

    `lock` is held by whoever changes what is shared, or programs of other views; it may be taken while a view's gate
    is locked, never the other way round.
    """

    def __init__(self, deltas: Deltas, plan: Plan) -> None:
        self.lock = threading.RLock()
        guard(self, 2)
        self.plan = plan
        self.planned = {planned.name: planned for planned in plan.deltas}
        """Deltas in memory: the plan's, and what was loaded from libraries."""
        self._documents: dict[str, DeltaSpec] = {}
        """Specs of the deltas that were loaded from libraries, one each."""
        self.order = {name: index for index, name in enumerate(self.planned)}
        """Order of application of every known delta, in memory or not."""
        self.placements = Placements(self.planned, plan.passes)
        """Where each delta works."""
        self.stacks = Stacks(deltas, self.planned, self.is_read, self.is_idle)
        self.unproven = set() if plan.proven else set(self.order)
        """Deltas whose sites no forward was seen to reach yet."""
        self.captured = "modules", ""
        """How the backbone was captured, and why so."""
        self.rivals = Rivals(plan.deltas)
        """Tells which deltas cannot act at once."""
        self._views: weakref.WeakSet[View] = weakref.WeakSet()
        self._tensors: tuple[int, ...] = ()

    def copy_around(self, deltas: Deltas, memo: dict[int, Any]) -> Self:
        """Copy for a model of its own that has these deltas, copies of some view's; what is plain data is the same."""
        twin = memo[id(self)] = type(self).__new__(type(self))
        memo[id(self.stacks.home)] = deltas
        twin.lock, twin.plan, twin.unproven = threading.RLock(), self.plan, set(self.unproven)
        guard(twin, 2)
        twin.planned, twin.order, twin.captured = dict(self.planned), dict(self.order), self.captured
        twin._documents = dict(self._documents)  # noqa: SLF001
        memo[id(self.planned)] = twin.planned
        twin.placements = Placements(twin.planned, self.placements.passes)
        twin.stacks = copy.deepcopy(self.stacks, memo)
        twin.stacks.is_read, twin.stacks.is_idle = twin.is_read, twin.is_idle
        twin.rivals = copy.deepcopy(self.rivals, memo)
        twin._views, twin._tensors = weakref.WeakSet(), ()  # noqa: SLF001
        return twin

    # Deltas

    def refuse_strengths(self, names: Iterable[str]) -> None:
        """Raise DeltaSpecError (DS446) for those of these deltas that cannot act in part."""
        planned = [self.planned[name] for name in names]
        if findings := [_no_strength(p) for p in planned if not _scales(p)]:
            raise DeltaSpecError(findings)

    def prove_reached(self, seen: dict[str, Observation], names: Iterable[str]) -> None:
        """Refuse, after their first forward, deltas whose modules' weights are read around them (DS437), and those that
        read another tensor than they should have (DS585).
        """
        names = tuple(names)
        refuse_bypassed(self.placements, seen, names)
        refuse_unread(self.placements, seen, names)
        self.unproven.difference_update(names)

    def add(self, planned: PlannedDelta, spec: DeltaSpec | None = None, *, proven: bool) -> None:
        """Take in a delta, with the spec that has it alone where the plan has none of it."""
        self.planned[planned.name] = planned
        if spec is not None:
            self._documents[planned.name] = spec
        self.rivals.add(planned)
        if not proven:
            self.unproven.add(planned.name)

    def plan_with(self, names: Iterable[str]) -> Plan:
        """Return the plan, with those of these deltas that were loaded from libraries."""
        loaded = [name for name in names if name in self._documents]
        if not loaded:
            return self.plan
        deltas = (*self.plan.deltas, *(self.planned[name] for name in loaded))
        specs = (*self.plan.specs, *(self._documents[name] for name in loaded))
        return replace(self.plan, deltas=deltas, specs=specs)

    def discard(self, name: str) -> bool:
        """Forget such a delta, whose name stays known; return False where a view is just being switched to it."""
        views = self.views()
        for view in views:
            view.unready(name)
        if name in self.attached():
            return False
        for view in views:
            view.forget(name)
        self.placements.pop(name, None)
        del self.planned[name]
        self._documents.pop(name, None)
        self.rivals.discard(name)
        self.unproven.discard(name)
        return True

    def after_fork(self, *, torn: bool) -> None:
        """Go on in a child process; views that another thread was in the midst of refuse by themselves."""

    def sweep(self) -> None:
        """Forget what was kept for deltas that are gone for good."""
        self.rivals.sweep()
        self.stacks.forget_kinds()

    def extend(self, plan: Plan, *, proven: bool) -> None:
        """Take in a plan that has more deltas, modules of the backbone: they apply after the others, before libraries'.

        `proven`: whether a forward was seen to reach them.
        """
        known = [delta.name for delta in self.plan.deltas]
        new = [delta for delta in plan.deltas if delta.name not in self.planned]
        first = 1 + max((self.order[name] for name in known), default=-1)
        later = {name: place + len(new) for name, place in self.order.items() if place >= first}
        self.order.update(later | {delta.name: first + number for number, delta in enumerate(new)})
        for delta in new:
            self.add(delta, proven=proven)
        self.plan = plan

    def reduce(self, plan: Plan) -> None:
        """Take in a plan that lacks deltas, modules of the backbone, which are attached nowhere: they go for good."""
        left = {delta.name for delta in plan.deltas}
        for name in [delta.name for delta in self.plan.deltas if delta.name not in left]:
            self.stacks.discard(name)
            self.discard(name)
            del self.order[name]
        self.plan = plan
        self.sweep()

    def containers(self) -> list[Deltas]:
        """Return the modules that hold the deltas, of all views, and those that outlived the first one."""
        found = {id(deltas): deltas for deltas in (view.host.deltas for view in self.views())}
        return list({**found, id(self.stacks.home): self.stacks.home}.values())

    def moved(self, deltas: Deltas) -> None:
        """Take the tensors of deltas as they are now for those that all views have."""
        self._tensors = _identities(deltas) if len(self.views()) > 1 else ()

    # Views

    def add_view(self, view: View, deltas: Deltas) -> None:
        """Take in a view, whose deltas these are."""
        with self.lock:
            self._views.add(view)
            if len(self._views) > 1:
                self._tensors = _identities(deltas)

    def views(self) -> list[View]:
        """Return all views that there are."""
        with self.lock:
            return list(self._views)

    def is_home(self, deltas: Deltas) -> bool:
        """Return whether what the stacks show of libraries belongs to these modules."""
        return self.stacks.home is deltas

    def any_host(self) -> Host:
        """Return the host of some view, for what is the same in all."""
        return self.any_view().host

    def any_view(self) -> View:
        """Return some view, for what all have in common."""
        with self.lock:
            return next(iter(self._views))

    def others(self, view: View) -> list[View]:
        """Return the other views."""
        return [other for other in self.views() if other is not view]

    def attached(self, leaving: View | None = None) -> set[str]:
        """Return the names of all deltas that are attached somewhere; not by `leaving`, which is about to switch."""
        return {name for view in self.views() if view is not leaving for name in view.active}

    def is_read(self) -> bool:
        """Return whether other threads may be reading the deltas' memory now."""
        return len(self.views()) > 1 or not self.is_idle()

    def is_idle(self) -> bool:
        """Return whether no forward runs in any view; one with rows that this thread prepares does not run yet."""
        me = threading.get_ident()
        return not any(gate.running or gate.rows not in (None, me) for gate in (view.gate for view in self.views()))

    def bind_others(self, view: View, deltas: Deltas) -> None:
        """Let the other views follow, where parameters of this view's deltas were replaced by other objects."""
        others = self.others(view)
        if not others:
            return
        now = _identities(deltas)
        if now != self._tensors:
            self._tensors = now
            for other in others:
                other.rebind()

    def refuse_moving(self, view: View, deltas: Deltas, fn: Any) -> None:
        """Raise DeltaSpecError (DS455) where a move or cast of a view would change deltas of other views.

        `fn` is what is about to be applied to every tensor.
        """
        if not self.others(view):
            return
        gc.collect()  # a model is full of cycles, so one that nobody has any more may still be there
        if self.others(view) and self._changes(deltas, fn):
            message = "a view cannot be moved or cast while there are others: they have the same deltas"
            hint = "move the model before the views are made, or let go of the other views first"
            raise DeltaSpecError([Diagnostic("DS455", message, file="<model>", suggestion=hint)])

    @torch.no_grad()
    def _changes(self, deltas: Deltas, fn: Any) -> bool:
        """Return whether a function that `nn.Module._apply` is given makes other tensors of those of the deltas."""
        tensors = [*deltas.parameters(), *deltas.buffers(), *self.stacks.held_rows()]
        return any(fn(tensor) is not tensor for tensor in tensors)


def _identities(deltas: Deltas) -> tuple[int, ...]:
    return tuple([id(tensor) for delta in deltas.held() for _, tensor in delta.tensors()])


def _scales(planned: PlannedDelta) -> bool:
    method = methods()[planned.method]
    return method.scales(planned.params) and all(method.scales(site.params) for site in planned.sites)


def _no_strength(planned: PlannedDelta) -> Diagnostic:
    adds = methods()[planned.method].strength is None
    why = f"{planned.method} {'adds tokens to the input' if adds else 'moves the positions of the tokens'}"
    message = f"delta {planned.name!r} has no strength between none and all: {why}"
    return Diagnostic("DS446", message, suggestion="attach it at strength 1, or leave it out")
