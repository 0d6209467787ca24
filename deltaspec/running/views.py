"""Views: several compiled models over the same weights and the same deltas, each with an active set of its own.

A view is a structural copy of the backbone (milliseconds, no weight memory) with its own switches, strengths and rows.
All views of a model have the same delta tensors, the same libraries and the same stacks; they are equals, and the one
that was compiled may go before the others.
"""

from __future__ import annotations

import copy
import gc
import threading
import weakref
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from deltaspec.clone import clone
from deltaspec.deltas import Delta, Deltas, beside
from deltaspec.diagnostics import DeltaSpecError, Diagnostic

if TYPE_CHECKING:
    from deltaspec.compiled import CompiledModel
    from deltaspec.running.attach import Attachments


class Family:
    """The views that share deltas."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        """Held by what changes what they share: deltas of libraries, stacks, programs of other views."""
        self._views: weakref.WeakSet[Attachments] = weakref.WeakSet()
        self._tensors: tuple[int, ...] = ()

    def add(self, view: Attachments) -> None:
        """Take in a view."""
        with self.lock:
            self._views.add(view)
            if len(self._views) > 1:
                self._tensors = _identities(view.deltas)

    def views(self) -> list[Attachments]:
        """Give all views that there are."""
        with self.lock:
            return list(self._views)

    def one(self) -> Attachments:
        """Give any view, for what all have in common."""
        with self.lock:
            return next(iter(self._views))

    def others(self, view: Attachments) -> list[Attachments]:
        """Give the other views."""
        return [other for other in self.views() if other is not view]

    def attached(self, leaving: Attachments | None = None) -> set[str]:
        """Give the names of all deltas that are attached somewhere; not by `leaving`, which is about to switch."""
        return {name for view in self.views() if view is not leaving for name in view.active}

    def is_read(self) -> bool:
        """Tell whether other threads may be reading the deltas' memory now."""
        return len(self.views()) > 1 or not self.is_idle()

    def is_idle(self) -> bool:
        """Tell whether no forward runs in any view; one with rows that this thread prepares does not run yet."""
        me = threading.get_ident()
        return not any(view.turns.running or view.turns.rows not in (None, me) for view in self.views())

    def bind_others(self, view: Attachments) -> None:
        """Let the other views follow, where parameters of the deltas were replaced by other objects."""
        others = self.others(view)
        if not others:
            return
        now = _identities(view.deltas)
        if now != self._tensors:
            self._tensors = now
            for other in others:
                other.rebind()

    def refuse_moving(self, view: Attachments, fn: Any) -> None:
        """Raise DeltaSpecError where a move or cast would change deltas of other views (DS455), or run into a forward.

        `fn` is what is about to be applied to every tensor.
        """
        if not self._alone(view) and _changes(view, fn):
            message = "a view cannot be moved or cast while there are others: they have the same deltas"
            hint = "move the model before the views are made, or let go of the other views first"
            raise DeltaSpecError([Diagnostic("DS455", message, file="<model>", suggestion=hint)])
        with view.turns.switching():
            pass

    def _alone(self, view: Attachments) -> bool:
        if not self.others(view):
            return True
        gc.collect()  # a model is full of cycles, so one that nobody has any more may still be there
        return not self.others(view)


def view_of(compiled: CompiledModel) -> CompiledModel:
    """Make another view of a compiled model, with the same deltas attached at the same strengths.

    The programs that it runs are made when they are first needed. Buffers are copied, as they are with no delta
    attached: forwards may write to them.
    """
    from deltaspec.compiled import CompiledModel
    from deltaspec.running.attach import Attachments

    mine = compiled._attachments
    with mine.turns.lock, mine.family.lock:
        if mine.stacks.home is mine.deltas:  # what all views use must not keep the first one alive
            mine.shown.update(mine.stacks.settle_in(_deltas_beside(mine.deltas)))
        backbone, deltas = _twin(mine)
        attachments = Attachments(backbone, deltas, mine.plan, mine.graph, mine)
        deltas.attachments = attachments
        made = CompiledModel(backbone, attachments, compiled.capture, compiled.capture_reason)
        made._copy_own_state(compiled, {})
        attachments.follow(mine)
    return made


def _twin(mine: Attachments) -> tuple[nn.Module, Deltas]:
    """Copy the structure of a backbone, in the state that it has with nothing attached."""
    programmer = mine.programmer
    replace: dict[int, Any] = {id(mine.deltas): (deltas := _deltas_beside(mine.deltas))}
    hosts = []
    for fqn, module in programmer.modules.items():
        forward = module.__dict__.get("forward")
        if forward is not programmer.originals[fqn]:
            replace[id(forward)] = _unbound
            hosts.append(fqn)
    backbone = clone(mine.backbone, replace=replace)
    twins = dict(backbone.named_modules(remove_duplicate=False))
    for fqn in hosts:
        twins[fqn].__dict__.pop("forward", None)
        if (original := programmer.originals[fqn]) is not None:
            # It is bound to the module it was put on: bind it to the copy.
            memo: dict[int, Any] = {id(old): twins[name] for name, old in programmer.modules.items()}
            twins[fqn].__dict__["forward"] = copy.deepcopy(original, memo)
    if mine.active or mine.mixer.armed:
        for name in mine.trained_in_backbone():
            backbone.get_parameter(name).requires_grad = True
        copies: dict[int, torch.Tensor] = {}
        for fqn, name, buffer, kept in mine.kept_buffers():
            twins[fqn]._buffers[name] = copies.setdefault(id(buffer), kept.clone())
    return backbone, deltas


def _unbound() -> None:
    """Stand for a forward that deltas need, until it is taken out of a copy."""


def _deltas_beside(deltas: Deltas) -> Deltas:
    """Give the deltas of another view: modules of its own, with the same tensors."""
    twin = Deltas()
    twin.training = deltas.training
    for name, delta in deltas._modules.items():
        assert isinstance(delta, Delta)
        twin._modules[name] = beside(delta, delta.training)
    return twin


def _identities(deltas: Deltas) -> tuple[int, ...]:
    return tuple([id(tensor) for delta in deltas._modules.values() for _, tensor in delta.tensors()])  # type: ignore[union-attr,operator]


@torch.no_grad()
def _changes(view: Attachments, fn: Any) -> bool:
    """Tell whether a function that `nn.Module._apply` is given makes other tensors of those of the deltas."""
    tensors = [*view.deltas.parameters(), *view.deltas.buffers(), *view.stacks.held_rows()]
    return any(fn(tensor) is not tensor for tensor in tensors)
