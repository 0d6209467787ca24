"""Attaching and detaching: which deltas of a view act right now, and the state of the backbone that goes with it."""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterable, Mapping
from typing import Any, Self

from torch import fx

from deltaspec.backbone.fingerprint import weights_fingerprint
from deltaspec.backbone.recorder import Observation
from deltaspec.deltas.combine import behind, refresh
from deltaspec.diagnostics.findings import DeltaSpecError, Diagnostic, require_known
from deltaspec.runtime.checkpointing import Recomputation
from deltaspec.runtime.first_forwards import FirstForwards
from deltaspec.runtime.forward_gate import install
from deltaspec.runtime.host import Host
from deltaspec.runtime.owner import ViewOwner
from deltaspec.runtime.ports import Residency, RowSwitch
from deltaspec.runtime.program import Footprint, Forward, Program
from deltaspec.runtime.program_builder import ProgramBuilder
from deltaspec.runtime.proving import FirstForward
from deltaspec.runtime.shared import Shared

_PROGRAMS = 1024
"""Programs that are kept at least."""


class Active:
    """The set of deltas that is attached in one view, and the programs of those that were."""

    rows: RowSwitch[Active]
    """Runs rows under different deltas in this view; whoever makes the view puts it in."""

    def __init__(self, shared: Shared, host: Host, residency: Residency, graph: fx.Graph | None) -> None:
        """Nothing is attached yet. `graph` is the whole model's, where it was traced."""
        self.shared, self.host, self.residency = shared, host, residency
        self.gate = host.gate
        self.active: tuple[str, ...] = ()
        """Names of the attached deltas, in order of application."""
        self.graph = graph
        self.builder = ProgramBuilder(host, shared.placements, graph)
        self.strengths = self.builder.strengths
        self._derived = frozenset(planned.name for planned in shared.plan.deltas if planned.derived is not None)
        self._join(ViewOwner(self, shared, host, residency))

    def _join(self, owner: ViewOwner) -> None:
        """Start with no program, and take part in what is decided by thread and by view."""
        self._programs: dict[tuple[tuple[str, ...], tuple[str, ...]], Program] = {}
        """Programs by the active set, in order of application, and those of it that are not at full strength."""
        self._ready: dict[tuple[str, ...], Program] = {}
        """Programs by names as they were given, checked, for active sets that need nothing but their program."""
        self._footprints: dict[frozenset[int], Footprint] = {}
        self._installed: Program | None = None
        """Program of the active set, once it is known."""
        host = self.host
        self.owner = host.deltas.owner = owner
        self.gate.after = Recomputation(host.modules.values(), self.state).after
        self.gate.moving = self.owner.before_move
        self.gate.first = FirstForwards.of(self, host, self.shared)
        install(host.backbone, self.gate)
        self.shared.add_view(self, self.host.deltas)

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """Copy together with the backbone; what is plain data is shared, programs are made anew."""
        twin = memo[id(self)] = type(self).__new__(type(self))
        # Forwards and modules of the backbone lead here and to these, so both are there before it is copied.
        owner, twin.rows = copy.deepcopy(self.owner, memo), copy.deepcopy(self.rows, memo)
        twin.host = copy.deepcopy(self.host, memo)
        twin.shared = self.shared.copy_around(twin.host.deltas, memo)
        twin.residency = copy.deepcopy(self.residency, memo)
        twin.gate, twin.active, twin.graph = twin.host.gate, self.active, self.graph
        twin._derived = self._derived  # noqa: SLF001
        twin.strengths = copy.deepcopy(self.strengths, memo)
        twin.builder = ProgramBuilder(twin.host, twin.shared.placements, self.graph, twin.strengths)
        ViewOwner.__init__(owner, twin, twin.shared, twin.host, twin.residency)
        twin._join(owner)  # noqa: SLF001
        twin.rows.begin(twin)
        return twin

    # Switching

    def switch(self, names: tuple[Any, ...]) -> bool:
        """Make exactly these deltas act at full strength, in whatever order, if they did before; return whether.

        The cost is a dictionary entry a host; it does not depend on how many deltas there are.
        """
        try:
            new = self._ready.get(names)
        except TypeError:  # What has no hash is no name.
            return False
        if new is None:
            return False
        if new.names == self.active and (names or not self.rows.installed) and not self.strengths:
            return True
        gate = self.gate
        with gate.lock:
            closed, gate.closed = gate.closed, True
            try:
                if gate.running or gate.rows is not None:
                    gate.require_none()
                if self.strengths:
                    return False
                if new.names == self.active:
                    self._remove_rows()
                else:
                    self._install(new)
            finally:
                gate.closed = closed
        # Another view may have dropped a delta of a library just before this one claimed it by `active`.
        return not self.residency.opened or self._ready.get(names) is new

    def activate(
        self, names: Iterable[str], anew: Collection[str] = (), strengths: Mapping[str, float] | None = None
    ) -> None:
        """Make exactly these deltas act, at these strengths (1 where none is given). `names` come in any order.

        Derived ones that did not act, and those in `anew`, are computed from their sources as they are now. Whatever
        raises leaves the deltas that acted acting.
        """
        names, values = tuple(names), strengths or {}
        if not values and self.switch(names):
            return
        shared = self.shared
        with self.gate.switching(), shared.lock, self.residency.in_memory(names, self):
            wanted = tuple(sorted(set(names), key=shared.order.__getitem__))
            scaled = tuple(name for name in wanted if values.get(name, 1.0) != 1.0)
            shared.refuse_strengths(scaled)
            new = self.program(wanted, scaled)
            self.derive(name for name in wanted if name not in self.active or name in anew)
            old = self._current()
            self.strengths.set({name: values[name] for name in scaled})
            if new is not old:
                self._install(new)
            elif not wanted:
                self._remove_rows()
            if self._derived.isdisjoint(wanted) and not scaled:
                self._ready[names] = self._ready[wanted] = new
                self._bound(self._ready)

    def follow(self, other: Active) -> None:
        """Attach what is attached in another view, as it is."""
        self._current()
        self.strengths.set(other.strengths.as_dict(other.active))
        self._install(self.program(other.active, self.strengths.scaled(other.active)))

    def program(self, names: tuple[str, ...], scaled: tuple[str, ...] = ()) -> Program:
        """Return the program of an active set, made and checked at its first use."""
        found = self._programs.get((names, scaled))
        if found is None:
            self.shared.rivals.refuse(names)
            watch = None if self.shared.unproven.isdisjoint(names) else self._watched
            found = self.builder.build(names, watch, scaled)
            found.finish(names, self._footprints)
            self._programs[names, scaled] = found
            self._bound(self._programs)
        return found

    def _current(self) -> Program:
        if self._installed is None:
            self._installed = self.program(self.active, self.strengths.scaled(self.active))
        return self._installed

    def _install(self, new: Program) -> None:
        """Put a program in the place of the current one, and the backbone's state with it."""
        old = self._installed or self._current()
        with_rows = self.rows.remove()
        if old.names or with_rows:
            self.host.buffers.restore()
        else:
            self.host.freeze()
        new.install(old)
        self.active, self._installed = new.names, new
        if self.residency.opened:
            self.residency.touch(new.names)
        if not new.names:
            self.host.flags.thaw()
        elif with_rows:
            self.rows.install()

    def _bound(self, programs: dict[Any, Program]) -> None:
        """Forget the programs made first, where there are many more than deltas: each holds what it binds."""
        limit = max(_PROGRAMS, 2 * len(self.shared.planned))
        while len(programs) > limit:
            del programs[next(names for names, program in programs.items() if program.names != self.active)]

    def unready(self, name: str) -> None:
        """Let no switch to a delta be quick any more."""
        _forget(self._ready, name)

    def forget(self, name: str) -> None:
        """Forget all that was made for a delta."""
        _forget(self._programs, name)
        self.owner.view_modules.pop(name, None)

    def rebind(self) -> None:
        """Bind tensors anew after they were moved, cast or replaced."""
        with self.gate.lock, self.shared.lock:
            with_rows = self.rows.remove()
            old = self._current()
            self._programs.clear()
            self._ready.clear()
            self.owner.view_modules.clear()
            self.rows.forget()
            self.host.follow_moves()
            self._installed = None
            self._current().install(old)
            if with_rows:
                self.rows.install()

    # Rows under different deltas

    def before_rows(self) -> None:
        """Make the backbone ready for forwards of rows, before they are put in."""
        if not self.active:
            self.host.freeze()

    def after_rows(self) -> None:
        """Put the backbone's state back, once forwards of rows were taken out."""
        self.host.buffers.restore()
        if not self.active:
            self.host.flags.thaw()

    def _remove_rows(self) -> None:
        if self.rows.remove():
            self.after_rows()

    # What is known of the attached deltas

    @property
    def acts(self) -> bool:
        """Whether deltas act, or may act by row."""
        return bool(self.active) or self.rows.installed

    def state(self) -> tuple[tuple[str, ...], dict[str, float], Any]:
        """Return all that decides which deltas a forward has: (attached, strengths, rows)."""
        return self.active, self.strengths.as_dict(), self.rows.running

    def weights_fingerprint(self) -> str | None:
        """Digest the backbone's weights and buffers, as they are without any delta."""
        # A forward may have written into buffers since something was attached; then they count as they were.
        kept = {(fqn, name): value for fqn, name, _, value in self.host.kept_buffers()} if self.acts else {}
        return weights_fingerprint(self.host.backbone, kept)

    def require(self, names: Collection[str]) -> None:
        """Have these deltas in memory, loaded if need be. Raise UnknownDeltaError, DeltaSpecError."""
        require_known(names, self.shared.order)
        self.residency.require(names)

    def derive(self, names: Iterable[str]) -> None:
        """Compute those of these deltas that are derived anew, from their sources as they are now."""
        if self._derived:
            host = self.host
            refresh(host.backbone, host.deltas, self.shared.plan, [name for name in names if name in self._derived])

    def derive_detached(self) -> None:
        """Compute the derived deltas that are not attached anew."""
        self.derive(name for name in self.shared.order if name not in self.active)

    def behind(self) -> list[str]:
        """Return the names of the attached derived deltas whose sources have changed since they were computed."""
        attached = [name for name in self.active if name in self._derived]
        return behind(self.host.backbone, self.host.deltas, self.shared.plan, attached)

    def require_proof(self) -> None:
        """Refuse to be traced (torch.compile, torch.export) before any forward proved the active sites (DS440)."""
        if not self.is_proven():
            message = "no forward has shown yet that the attached deltas are reached, and a trace cannot show it"
            hint = "pass example_inputs to deltaspec.compile, or call the model once before torch.compile or export"
            raise DeltaSpecError([Diagnostic("DS440", message, suggestion=hint)])

    def is_proven(self) -> bool:
        """Return whether some forward reached the sites of all attached deltas."""
        return self.shared.unproven.isdisjoint(self.active)

    def prove(self, seen: dict[str, Observation]) -> None:
        """Take what a forward was seen to do: refuse attached deltas that it bypassed (DS437), and watch no more."""
        self.shared.prove_reached(seen, self.active)
        self.rebind()

    def _watched(self, forward: Forward) -> Forward:
        return FirstForward(self.host.backbone, forward, self.is_proven, self.prove).run


def _forget(programs: dict[Any, Program], name: str) -> None:
    for key in [key for key, program in programs.items() if name in program.names]:
        del programs[key]
