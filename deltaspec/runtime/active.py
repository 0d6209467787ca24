"""Attaching and detaching: which deltas of a view act right now, and the state of the backbone that goes with it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any, Self

from torch import Tensor, fx

from deltaspec.backbone.recorder import Observation
from deltaspec.diagnostics.findings import DeltaSpecError, Diagnostic, require_known
from deltaspec.runtime.checkpointing import Recomputation
from deltaspec.runtime.derived import Derived
from deltaspec.runtime.first_forwards import FirstForwards
from deltaspec.runtime.forward_gate import install
from deltaspec.runtime.guard import Guard
from deltaspec.runtime.host import Host
from deltaspec.runtime.outside import is_offloaded, refuse_shards, take_out_of_offloading
from deltaspec.runtime.owner import ViewOwner
from deltaspec.runtime.ports import Residency, RowSwitch
from deltaspec.runtime.program import Program
from deltaspec.runtime.program_builder import ProgramBuilder
from deltaspec.runtime.programs import Programs
from deltaspec.runtime.proving import FirstForward
from deltaspec.runtime.shared import Shared
from deltaspec.runtime.sockets import Forward, Socket
from deltaspec.runtime.tasks import Tasks
from deltaspec.runtime.unplaced import refuse_unplaced
from deltaspec.runtime.wrapped import Beneath, Wrapped


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
        self.derived = Derived(shared, host)
        self._join(ViewOwner(self, shared, host, residency))
        self.settle()

    def _join(self, owner: ViewOwner) -> None:
        """Start with no program, and take part in what is decided by thread and by view."""
        self.programs = Programs()
        self._installed: Program | None = None
        """Program of the active set, once it is known."""
        host = self.host
        self.owner = host.deltas.owner = owner
        self.guard, self._wrapped = Guard(host), Wrapped()
        self.tasks = Tasks(self.state)
        self.gate.before, self.gate.failed = self._before_forward, self._explain
        self.gate.traced = self._before_trace
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
            self._refuse_unplaced(wanted)
            new = self.program(wanted, scaled)
            self.derived.refresh(name for name in wanted if name not in self.active or name in anew)
            self._exchange(new, {name: values[name] for name in scaled})
            self.tasks.note()
            if self.derived.names.isdisjoint(wanted) and not scaled:
                self.programs.ready[names] = self.programs.ready[wanted] = new
                self.programs.limit(len(shared.planned), self.active)

    def _exchange(self, new: Program, strengths: Mapping[str, float]) -> None:
        """Put a program and strengths in the place of the current ones, or leave these, whatever comes between."""
        old, names, before = self._current(), self.active, self.strengths.as_dict()
        try:
            if strengths or before:
                self.strengths.set(strengths)
            if new is not old:
                self._install(new)
            elif not names:
                self._remove_rows()
        except BaseException:
            self._repair(names, before)
            raise

    def _repair(self, names: tuple[str, ...], strengths: Mapping[str, float]) -> None:
        """Attach what was attached before a switch that ended halfway, by an interrupt say, whatever it has done."""
        host, with_rows = self.host, self.rows.installed
        self.rows.remove()
        self.guard.forget()
        for socket in host.sockets.values():
            socket.leave()
        self.strengths.set(strengths)
        self.active, self._installed = names, self.program(())
        acts = bool(names) or with_rows
        if host.flags.frozen != acts:
            host.freeze() if acts else host.flags.thaw()
        elif acts:
            host.flags.freeze()
        self.follow_others()
        if with_rows and not self.rows.installed:
            self.rows.install()

    def follow(self, other: Active) -> None:
        """Attach what is attached in another view, as it is."""
        self._current()
        self.strengths.set(other.strengths.as_dict(other.active))
        self._install(self.program(other.active, self.strengths.scaled(other.active)))

    def program(self, names: tuple[str, ...], scaled: tuple[str, ...] = ()) -> Program:
        """Return the program of an active set, made and checked at its first use."""
        found = self.programs.get(names, scaled)
        if found is None:
            self.shared.rivals.refuse(names)
            watch = None if self.shared.unproven.isdisjoint(names) else self._watched
            found = self.builder.build(names, watch, scaled)
            self.programs.keep(found, names, scaled)
            self.programs.limit(len(self.shared.planned), self.active)
        return found

    def _current(self) -> Program:
        if self._installed is None:
            self._installed = self.program(self.active, self.strengths.scaled(self.active))
        return self._installed

    def _install(self, new: Program) -> None:
        """Put a program in the place of the current one, and the backbone's state with it."""
        with_rows = False
        if is_offloaded(self.host.deltas, new.names):
            take_out_of_offloading(self.host.deltas)
        if self.guard.forwards_changed() if self.active else self.guard.changed():
            with_rows = self._follow_others()
            new = self.program(new.names, self.strengths.scaled(new.names))
        old = self._installed or self._current()
        with_rows = self.rows.remove() or with_rows
        if self.active or with_rows:
            self.host.buffers.restore()
        else:
            self.host.freeze()
        if new.install(old):
            self.guard.take(new.footprint)
        self.active, self._installed = new.names, new
        if self.residency.opened:
            self.residency.touch(new.names)
        if not new.names:
            self.host.flags.thaw()
        elif with_rows:
            self.rows.install()

    def forwards(self) -> dict[Socket, Forward]:
        """Return what each module runs under what is attached."""
        return self._current().forwards

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
        self.gate.first = FirstForwards.of(self, self.host, self.shared)

    def rebind(self) -> None:
        """Bind tensors anew after they were moved, cast or replaced."""
        with self.gate.lock, self.shared.lock:
            with_rows = self.rows.remove()
            old = self._current()
            self.programs.clear()
            self.owner.view_modules.clear()
            self.rows.forget()
            self.host.follow_moves()
            self._installed = None
            self._current().install(old)
            self.guard.take()
            if with_rows:
                self.rows.install()

    # What other tools changed

    def _before_forward(self) -> Callable[[], None] | None:
        self.tasks.check()
        if not self.active or self.gate.rows is not None or self._wrapped.watching:
            return None
        if is_offloaded(self.host.deltas, self.active):
            take_out_of_offloading(self.host.deltas)
        self.follow_others()
        self._refuse_unplaced(self.active)
        return self._wrapped.watch()

    def _explain(self, error: Exception) -> None:
        refuse_shards(self.host, [self.shared.planned[name] for name in self.active], error)

    def _refuse_unplaced(self, names: Iterable[str]) -> None:
        refuse_unplaced(self.host.deltas, names, self.shared.planned, self.host.modules)

    def _before_trace(self) -> None:
        self._refuse_unplaced(self.active)
        if self.active and self.guard.changed():
            message = "forwards or modules were changed since the last switch, and a trace can install nothing"
            hint = "call the model once before torch.compile traces it anew"
            raise DeltaSpecError([Diagnostic("DS458", message, file="<model>", suggestion=hint)])

    def follow_others(self) -> None:
        """Let what is attached act on what other tools made of the backbone. Raise DeltaSpecError (DS458) if it cannot.

        A forward that another library put in the place of ours becomes the module's own, beneath the deltas; one that
        leads to ours stays around it. A module that took the place of another is taken for it.
        """
        if self.guard.changed():
            with self.gate.switching(), self.shared.lock:
                with_rows = self._follow_others()
                new = self.program(self.active, self.strengths.scaled(self.active))
                new.install(self._current())
                self._installed = new
                self.guard.take()
                if with_rows:
                    self.rows.install()

    def _follow_others(self) -> bool:
        """Take all that is ours out, and the backbone as it is now; return whether there were rows."""
        with_rows, old, host = self.rows.remove(), self._installed or self._current(), self.host
        assert old.footprint is not None
        self.guard.forget()  # until something is installed
        sockets = [(fqn, host.sockets[id(m)]) for fqn, m in host.modules.items() if id(m) in host.sockets]
        for fqn, socket in sockets:
            if socket.is_hidden(acting=socket in old.footprint.sockets):
                top = socket.module.__dict__.get("forward")
                socket.rebase(top, None if top is None else Beneath(fqn, top))
            socket.leave()
        self._wrapped.take(sockets)
        self.programs.clear()
        self.rows.forget()
        self._installed = self.program(())
        modules = host.current_modules()
        if modules.keys() != host.modules.keys() or any(modules[fqn] is not m for fqn, m in host.modules.items()):
            host.adopt(modules, acts=bool(self.active) or with_rows)
            self.gate.after = Recomputation(modules.values(), self.state).after
        return with_rows

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

    def is_proven(self) -> bool:
        """Return whether some forward reached the sites of all attached deltas."""
        return self.shared.unproven.isdisjoint(self.active)

    def prove(self, seen: dict[str, Observation]) -> None:
        """Take what a forward was seen to do: refuse attached deltas that it bypassed (DS437), and watch no more."""
        self.shared.prove_reached(seen, self.active)
        self.rebind()

    def _watched(self, forward: Forward) -> Forward:
        return FirstForward(self.host.backbone, forward, self.is_proven, self.prove).run
