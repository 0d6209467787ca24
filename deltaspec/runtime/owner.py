"""What answers the deltas' modules in a view: for deltas that are no modules, and where tensors are moved or loaded."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from deltaspec.deltas.modules import Delta, beside
from deltaspec.runtime.host import Host
from deltaspec.runtime.pickled_alone import Part
from deltaspec.runtime.ports import Residency, View
from deltaspec.runtime.shared import Shared


class ViewOwner(Part):
    """The `Owner` of the deltas of one view."""

    def __init__(self, view: View, shared: Shared, host: Host, residency: Residency) -> None:
        self._view, self._shared, self._residency = view, shared, residency
        self._deltas, self._gate, self._buffers, self._stacks = host.deltas, host.gate, host.buffers, shared.stacks
        self.view_modules: dict[str, Delta] = {}
        """Deltas of libraries, as modules of this view: those of the first view are the stacks' own."""

    def __deepcopy__(self, memo: dict[int, Any]) -> ViewOwner:
        """Copy with the view, which fills what this returns: its copy may lead here again before it is done."""
        twin = memo[id(self)] = type(self).__new__(type(self))
        copy.deepcopy(self._view, memo)
        return twin

    def missing(self, name: str) -> Delta | None:
        """Return a delta that is no module, in memory; None where there is none. Raise KeyError for an unloaded one."""
        if name not in self._residency:
            return None
        held = self._residency.delta(name)
        if self._shared.is_home(self._deltas):
            return held
        shown = self.view_modules.get(name)
        if shown is None or not shown.is_view_of(held):
            shown = self.view_modules[name] = beside(held, self._deltas.training)
        return shown

    def keep(self, modules: Mapping[str, Delta]) -> None:
        """Let these modules show deltas of libraries in this view."""
        self.view_modules.update(modules)

    def train(self, mode: bool) -> None:
        """Put deltas that are no modules into training mode, or out of it."""
        if self._shared.is_home(self._deltas):
            self._stacks.train(mode)
        for delta in self.view_modules.values():
            delta.train(mode)

    def before_move(self, fn: Any) -> None:
        """Raise DeltaSpecError where a move or cast would change other views (DS455), or run into a forward (DS456)."""
        self._shared.refuse_moving(self._view, self._deltas, fn)
        with self._gate.switching():
            pass

    def after_move(self, fn: Any) -> None:
        """Follow the deltas, which were moved or cast by a function of tensors."""
        if not self._shared.others(self._view):
            self._residency.moved()
            self._stacks.apply(fn)
        self._changed()

    def after_load(self) -> None:
        """Follow what `load_state_dict` did to the deltas and the backbone's buffers."""
        self._buffers.loaded()
        self._changed()

    def _changed(self) -> None:
        self._view.rebind()
        self._shared.bind_others(self._view, self._deltas)
