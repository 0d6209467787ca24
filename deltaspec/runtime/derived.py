"""Derived deltas of a view: computed from their sources when they are attached, or asked for."""

from __future__ import annotations

from collections.abc import Collection, Iterable

from deltaspec.deltas.combine import behind, refresh
from deltaspec.planning.plan import Plan
from deltaspec.runtime.host import Host
from deltaspec.runtime.shared import Shared


class Derived:
    """The derived deltas of a model, as one view computes them."""

    def __init__(self, shared: Shared, host: Host) -> None:
        self._shared, self._host = shared, host
        self._plan: Plan | None = None
        self._names: frozenset[str] = frozenset()

    @property
    def names(self) -> frozenset[str]:
        """Names of the derived deltas that there are now."""
        plan = self._shared.plan
        if self._plan is not plan:
            self._plan, self._names = plan, frozenset(d.name for d in plan.deltas if d.derived is not None)
        return self._names

    def refresh(self, names: Iterable[str]) -> None:
        """Compute those of these deltas that are derived anew, from their sources as they are now."""
        if self.names:
            host = self._host
            refresh(host.backbone, host.deltas, self._shared.plan, [name for name in names if name in self.names])

    def refresh_others(self, attached: Collection[str]) -> None:
        """Compute the derived deltas that are not attached anew."""
        self.refresh(name for name in self._shared.order if name not in attached)

    def behind(self, attached: Iterable[str]) -> list[str]:
        """Return the names of the attached derived deltas whose sources have changed since they were computed."""
        names = [name for name in attached if name in self.names]
        return behind(self._host.backbone, self._host.deltas, self._shared.plan, names)
