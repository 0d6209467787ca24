"""What is known of the deltas of one view: which there are, what they may do together, and what they come from."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Collection, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch

from deltaspec.deltas.combine import behind, refresh
from deltaspec.diagnostics.findings import DeltaSpecError, Diagnostic, require_known
from deltaspec.methods.registry import methods
from deltaspec.runtime.proving import refuse_bypassed

if TYPE_CHECKING:
    from torch import nn

    from deltaspec.backbone.observe import Observation
    from deltaspec.deltas.modules import Deltas
    from deltaspec.planning.conflicts import Rivals
    from deltaspec.planning.plan import Plan
    from deltaspec.planning.planned import PlannedDelta
    from deltaspec.runtime.ports import Residency, View
    from deltaspec.runtime.program import Forward
    from deltaspec.runtime.program_builder import ProgramBuilder


class Known:
    """The part of `Attachments` that attaches nothing."""

    backbone: nn.Module
    deltas: Deltas
    plan: Plan
    planned: dict[str, PlannedDelta]
    order: dict[str, int]
    active: tuple[str, ...]
    libraries: Residency
    builder: ProgramBuilder
    unproven: set[str]
    _rivals: Rivals
    _derived: frozenset[str]

    @property
    def device(self) -> torch.device:
        """Where the deltas are."""
        return next((tensor.device for tensor in self.deltas.parameters()), torch.device("cpu"))

    def require_known(self, names: Iterable[str]) -> None:
        """Raise UnknownDeltaError, with all findings, for names that no delta has."""
        require_known(names, self.order)

    def require(self, names: Collection[str]) -> None:
        """Have these deltas in memory, loaded if need be. Raises UnknownDeltaError, DeltaSpecError."""
        self.require_known(names)
        self.libraries.require(names)

    def refuse_strengths(self, names: Iterable[str]) -> None:
        """Raise DeltaSpecError (DS446) for those of these deltas that cannot act in part."""
        planned = [self.planned[name] for name in names]
        if findings := [_no_strength(p) for p in planned if methods()[p.method].strength is None]:
            raise DeltaSpecError(findings)

    def refuse_rivals(self, names: Sequence[str]) -> None:
        """Refuse deltas that cannot act at once (DS436); names are in order of application."""
        self._rivals.refuse(names)

    def derive(self, names: Iterable[str]) -> None:
        """Compute those of these deltas that are derived anew, from their sources as they are now."""
        if self._derived:
            refresh(self.backbone, self.deltas, self.plan, [name for name in names if name in self._derived])

    def derive_detached(self) -> None:
        """Compute the derived deltas that are not attached anew."""
        self.derive(name for name in self.order if name not in self.active)

    def behind(self) -> list[str]:
        """Return the names of the attached derived deltas whose sources have changed since they were computed."""
        return behind(self.backbone, self.deltas, self.plan, [name for name in self.active if name in self._derived])

    def original_forward(self, fqn: str) -> Forward | None:
        """Return the instance-level forward that a module of the backbone had before any delta (None: it had none)."""
        return self.builder.originals.get(fqn)

    def prove_reached(self, seen: dict[str, Observation], names: Iterable[str]) -> None:
        """Refuse, after their first forward, deltas whose modules' weights are read around them (DS437)."""
        names = tuple(names)
        refuse_bypassed(self.builder, seen, names)
        self.unproven.difference_update(names)

    def require_proof(self) -> None:
        """Refuse to be traced (torch.compile, torch.export) before any forward proved the active sites (DS440)."""
        if not self.unproven.isdisjoint(self.active):
            message = "no forward has shown yet that the attached deltas are reached, and a trace cannot show it"
            hint = "pass example_inputs to deltaspec.compile, or call the model once before torch.compile or export"
            raise DeltaSpecError([Diagnostic("DS440", message, suggestion=hint)])


def _no_strength(planned: PlannedDelta) -> Diagnostic:
    message = f"delta {planned.name!r} has no strength between none and all: {planned.method} adds tokens to the input"
    return Diagnostic("DS446", message, suggestion="attach it at strength 1, or leave it out")


class Family:
    """The views that share deltas."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        """Held by what changes what they share: deltas of libraries, stacks, programs of other views."""
        self._views: weakref.WeakSet[View] = weakref.WeakSet()
        self._tensors: tuple[int, ...] = ()

    def add(self, view: View) -> None:
        """Take in a view."""
        with self.lock:
            self._views.add(view)
            if len(self._views) > 1:
                self._tensors = _identities(view.deltas)

    def views(self) -> list[View]:
        """Return all views that there are."""
        with self.lock:
            return list(self._views)

    def one(self) -> View:
        """Return any view, for what all have in common."""
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
        return not any(view.gate.running or view.gate.rows not in (None, me) for view in self.views())

    def bind_others(self, view: View) -> None:
        """Let the other views follow, where parameters of the deltas were replaced by other objects."""
        others = self.others(view)
        if not others:
            return
        now = _identities(view.deltas)
        if now != self._tensors:
            self._tensors = now
            for other in others:
                other.rebind()

    def refuse_moving(self, view: View, fn: Any) -> None:
        """Raise DeltaSpecError where a move or cast would change deltas of other views (DS455), or run into a forward.

        `fn` is what is about to be applied to every tensor.
        """
        if not self._alone(view) and _changes(view, fn):
            message = "a view cannot be moved or cast while there are others: they have the same deltas"
            hint = "move the model before the views are made, or let go of the other views first"
            raise DeltaSpecError([Diagnostic("DS455", message, file="<model>", suggestion=hint)])
        with view.gate.switching():
            pass

    def _alone(self, view: View) -> bool:
        if not self.others(view):
            return True
        gc.collect()  # a model is full of cycles, so one that nobody has any more may still be there
        return not self.others(view)


def _identities(deltas: Deltas) -> tuple[int, ...]:
    return tuple([id(tensor) for delta in deltas._modules.values() for _, tensor in delta.tensors()])  # type: ignore[union-attr,operator]


@torch.no_grad()
def _changes(view: View, fn: Any) -> bool:
    """Return whether a function that `nn.Module._apply` is given makes other tensors of those of the deltas."""
    tensors = [*view.deltas.parameters(), *view.deltas.buffers(), *view.stacks.held_rows()]
    return any(fn(tensor) is not tensor for tensor in tensors)
