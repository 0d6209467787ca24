"""Attaching and detaching: which deltas of a view act right now, and the state of the backbone that goes with it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any, Self

from torch import Tensor, fx

from deltaspec.diagnostics.findings import DeltaSpecError, Diagnostic, require_known
from deltaspec.runtime.derived import Derived
from deltaspec.runtime.forward_gate import install
from deltaspec.runtime.guard import Guard
from deltaspec.runtime.host import Host
from deltaspec.runtime.installation import Installation
from deltaspec.runtime.outside import are_hooked, refuse_shards, take_out_of_offloading
from deltaspec.runtime.owner import ViewOwner
from deltaspec.runtime.ports import Residency
from deltaspec.runtime.program import Program
from deltaspec.runtime.program_builder import ProgramBuilder
from deltaspec.runtime.programs import Programs
from deltaspec.runtime.shared import Shared
from deltaspec.runtime.tasks import Tasks
from deltaspec.runtime.wrapped import Wrapped


class Active(Installation):
    """The set of deltas that is attached in one view, and what is known of those in it."""

    def __init__(self, shared: Shared, host: Host, residency: Residency, graph: fx.Graph | None) -> None:
        """Nothing is attached yet. `graph` is the whole model's, where it was traced."""
        self.shared, self.host, self.residency = shared, host, residency
        self.gate = host.gate
        self.active: tuple[str, ...] = ()
        self.graph = graph
        self.builder = ProgramBuilder(host, shared.placements, graph)
        self.strengths = self.builder.strengths
        self.derived = Derived(shared, host)
        self._join(ViewOwner(self, shared, host, residency))
        self.settle()

    def _join(self, owner: ViewOwner) -> None:
        """Start with no program, and take part in what is decided by thread and by view."""
        self.programs = Programs()
        self._installed = None
        host = self.host
        self.owner = host.deltas.owner = owner
        self.guard, self.wrapped = Guard(host, self.builder), Wrapped()
        self.tasks = Tasks(self.state)
        self.gate.before, self.gate.failed = self._before_forward, self._explain
        self.gate.traced = self._before_trace
        self.gate.moving = self.owner.before_move
        self.look_on()
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
        twin.derived = Derived(twin.shared, twin.host)
        twin.strengths = copy.deepcopy(self.strengths, memo)
        twin.builder = ProgramBuilder(twin.host, twin.shared.placements, self.graph, twin.strengths)
        ViewOwner.__init__(owner, twin, twin.shared, twin.host, twin.residency)
        twin._join(owner)  # noqa: SLF001
        twin.rows.begin(twin)
        return twin

    def settle(self) -> None:
        """Take the backbone and the tensors of the deltas as they are now for what others may change from now on."""
        self.guard.take()
        self.guard.look_above()
        self.host.deltas.own()

    # Switching

    def switch(self, names: tuple[Any, ...]) -> bool:
        """Make exactly these deltas act at full strength, in whatever order, if they did before; return whether.

        The cost is one write a host; it does not depend on how many deltas there are.
        """
        try:
            new = self.programs.ready.get(names)
        except TypeError:  # What has no hash is no name.
            return False
        if new is None:
            return False
        if new.names == self.active and (names or not self.rows.installed) and not self.strengths:
            self.tasks.note()
            return True
        gate = self.gate
        with gate.lock:
            closed, gate.closed = gate.closed, True
            try:
                if gate.running or gate.rows is not None:
                    gate.require_none()
                if self.strengths:
                    return False
                self._exchange(new, {})
            finally:
                gate.closed = closed
        self.tasks.note()
        # Another view may have dropped a delta of a library just before this one claimed it by `active`.
        return not self.residency.opened or self.programs.ready.get(names) is new

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
            self.refuse_unplaced(wanted)
            new = self.program(wanted, scaled)
            self.derived.refresh(name for name in wanted if name not in self.active or name in anew)
            self._exchange(new, {name: values[name] for name in scaled})
            self.tasks.note()
            if self.derived.names.isdisjoint(wanted) and not scaled:
                self.programs.ready[names] = self.programs.ready[wanted] = new
                self.programs.limit(len(shared.planned), self.active)

    def _exchange(self, new: Program, strengths: Mapping[str, float]) -> None:
        """Put a program and strengths in the place of the current ones, or leave these, whatever comes between."""
        old, names, before = self.current(), self.active, self.strengths.as_dict()
        try:
            if strengths or before:
                self.strengths.set(strengths)
            if new is not old or new.names != names:  # else what should be attached could not be
                self.install(new)
            elif not names:
                self.remove_rows()
        except BaseException:
            self.repair(names, before)
            raise

    def follow(self, other: Active) -> None:
        """Attach what is attached in another view, as it is."""
        self.current()
        self.strengths.set(other.strengths.as_dict(other.active))
        self.install(self.program(other.active, self.strengths.scaled(other.active)))

    def unready(self, name: str) -> None:
        """Let no switch to a delta be quick any more."""
        self.programs.unready(name)

    def forget(self, name: str) -> None:
        """Forget all that was made for a delta."""
        self.programs.forget(name)
        self.owner.view_modules.pop(name, None)

    def leave(self, names: Collection[str]) -> None:
        """Detach these deltas, where they are attached."""
        left = tuple(name for name in self.active if name not in names)
        if left != self.active:
            self.activate(left, strengths=self.strengths.as_dict(left))

    def changed(self, gone: Collection[str], graph: fx.Graph | None) -> None:
        """Follow deltas that came, or are gone; take another trace of the whole model, where there is one."""
        for name in gone:
            self.unready(name)
            self.forget(name)
            self.strengths.forget(name)
        if graph is not self.graph:  # what is installed still does what it is to do
            self.graph = graph
            self.builder.take(graph)
            self.programs.clear()
        self.rows.changed(gone)
        self.look_on()

    # What other tools changed

    def _before_forward(self) -> Callable[[], None] | None:
        self.tasks.check()
        if self.rows.running is not None and self.gate.rows is None:
            self.rows.end()
        if not self.active or self.gate.rows is not None or self.wrapped.watching:
            return None
        if are_hooked(self.host.deltas, self.active):
            take_out_of_offloading(self.host.deltas)
        self.follow_others()
        self.refuse_unplaced(self.active)
        return self.wrapped.watch()

    def _explain(self, error: Exception) -> None:
        refuse_shards(self.host, [self.shared.planned[name] for name in self.active], error)

    def _before_trace(self) -> None:
        self.refuse_unplaced(self.active)
        if self.active and self.guard.changed():
            message = "forwards or modules were changed since the last switch, and a trace can install nothing"
            hint = "call the model once before torch.compile traces it anew"
            raise DeltaSpecError([Diagnostic("DS458", message, file="<model>", suggestion=hint)])

    # What is known of the attached deltas

    def kept(self) -> dict[tuple[str, str], Tensor]:
        """Return the values that buffers will have when nothing is attached, by module's FQN and name."""
        # A forward may have written into buffers since something was attached; then they count as they were.
        return {(fqn, name): value for fqn, name, _, value in self.host.kept_buffers()} if self.acts else {}

    def require(self, names: Collection[str]) -> None:
        """Have these deltas in memory, loaded if need be. Raise UnknownDeltaError, DeltaSpecError."""
        require_known(names, self.shared.order)
        self.residency.require(names)

    def require_proof(self) -> None:
        """Refuse to be traced (torch.compile, torch.export) before any forward proved the active sites (DS440)."""
        if not self.is_proven():
            message = "no forward has shown yet that the attached deltas are reached, and a trace cannot show it"
            hint = "pass example_inputs to deltaspec.compile, or call the model once before torch.compile or export"
            raise DeltaSpecError([Diagnostic("DS440", message, suggestion=hint)])
