"""What stands in the sockets of one view: put in, followed where other tools change the backbone, put right."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from deltaspec.backbone.recorder import Observation
from deltaspec.deltas.strengths import Strengths
from deltaspec.runtime.checkpointing import Recomputation
from deltaspec.runtime.first_forwards import FirstForwards
from deltaspec.runtime.forward_gate import ForwardGate
from deltaspec.runtime.guard import Guard
from deltaspec.runtime.host import Host
from deltaspec.runtime.outside import are_hooked, take_out_of_offloading
from deltaspec.runtime.owner import ViewOwner
from deltaspec.runtime.ports import Residency, RowSwitch
from deltaspec.runtime.program import Program
from deltaspec.runtime.program_builder import ProgramBuilder
from deltaspec.runtime.programs import Programs
from deltaspec.runtime.proving import FirstForward
from deltaspec.runtime.shared import Shared
from deltaspec.runtime.sockets import Forward, Socket
from deltaspec.runtime.unplaced import refuse_unplaced as unplaced
from deltaspec.runtime.wrapped import Beneath, Wrapped


class Installation:
    """The program that stands in the sockets, the backbone's state that goes with it, and what they are compared with.

    Whoever holds the gate's lock may change it.
    """

    shared: Shared
    host: Host
    gate: ForwardGate
    residency: Residency
    owner: ViewOwner
    builder: ProgramBuilder
    strengths: Strengths
    programs: Programs
    guard: Guard
    wrapped: Wrapped
    rows: RowSwitch[Any]
    """Runs rows under different deltas in this view; whoever makes the view puts it in."""
    active: tuple[str, ...]
    """Names of the attached deltas, in order of application."""
    _installed: Program | None
    """Program of the active set, once it is known."""

    @property
    def acts(self) -> bool:
        """Whether deltas act, or may act by row."""
        return bool(self.active) or self.rows.installed

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

    def _watched(self, forward: Forward) -> Forward:
        return FirstForward(self.host.backbone, forward, self.is_proven, self.prove).run

    def is_proven(self) -> bool:
        """Return whether some forward reached the sites of all attached deltas."""
        return self.shared.unproven.isdisjoint(self.active)

    def prove(self, seen: dict[str, Observation]) -> None:
        """Take what a forward was seen to do: refuse attached deltas that it bypassed (DS437), and watch no more."""
        self.shared.prove_reached(seen, self.active)
        self.rebind()

    def forwards(self) -> dict[Socket, Forward]:
        """Return what each module runs under what is attached."""
        return self.current().forwards

    def current(self) -> Program:
        """Return the program of the active set."""
        if self._installed is None:
            self._installed = self.program(self.active, self.strengths.scaled(self.active))
        return self._installed

    def install(self, new: Program) -> None:
        """Put a program in the place of the current one, and the backbone's state with it."""
        with_rows = False
        if are_hooked(self.host.deltas, new.names):
            take_out_of_offloading(self.host.deltas)
        if self.guard.forwards_changed() if self.active else self.guard.changed():
            with_rows = self._follow_others()
            new = self.program(new.names, self.strengths.scaled(new.names))
        old = self.current()
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

    def repair(self, names: tuple[str, ...], strengths: Mapping[str, float]) -> None:
        """Attach what was attached before a switch that ended halfway, by an interrupt say, whatever it has done."""
        host, with_rows = self.host, self.rows.installed
        self.rows.remove()
        self.guard.forget()
        for socket in host.sockets.values():
            socket.leave()
        self.strengths.set(strengths)
        self.active, self._installed = names, self.program(())
        if not names and not with_rows:
            host.flags.thaw()
        elif host.flags.frozen:
            host.flags.freeze()  # to its end
        else:
            host.freeze()
        self.follow_others()
        if with_rows and not self.rows.installed:
            self.rows.install()

    def rebind(self) -> None:
        """Bind tensors anew after they were moved, cast or replaced."""
        with self.gate.lock, self.shared.lock:
            with_rows = self.rows.remove()
            old = self.current()
            self.programs.clear()
            self.owner.view_modules.clear()
            self.rows.forget()
            self.host.follow_moves()
            self._installed = None
            self.current().install(old)
            self.guard.take()
            if with_rows:
                self.rows.install()

    def follow_others(self) -> None:
        """Let what is attached act on what other tools made of the backbone. Raise DeltaSpecError (DS458) if it cannot.

        A forward that another library put in the place of ours becomes the module's own, beneath the deltas; one that
        leads to ours stays around it. A module that took the place of another is taken for it.
        """
        if self.guard.changed():
            with self.gate.switching(), self.shared.lock:
                with_rows = self._follow_others()
                new = self.program(self.active, self.strengths.scaled(self.active))
                new.install(self.current())
                self._installed = new
                self.guard.take()
                if with_rows:
                    self.rows.install()
        if self.guard.above_changed():
            self.look_on()
            self.guard.look_above()

    def _follow_others(self) -> bool:
        """Take all that is ours out, and the backbone as it is now; return whether there were rows."""
        with_rows, old, host = self.rows.remove(), self.current(), self.host
        assert old.footprint is not None
        self.guard.forget()  # until something is installed
        sockets = [(fqn, host.sockets[id(m)]) for fqn, m in host.modules.items() if id(m) in host.sockets]
        for fqn, socket in sockets:
            if socket.is_hidden(acting=socket in old.footprint.sockets):
                top = socket.module.__dict__.get("forward")
                socket.rebase(top, None if top is None else Beneath(fqn, top))
            elif socket.original is None:
                socket.rebase(None)  # the class may be another, or have another forward
            socket.leave()
        self.wrapped.take(sockets)
        self.programs.clear()
        self.rows.forget()
        self._installed = self.program(())
        modules = host.current_modules()
        if modules.keys() != host.modules.keys() or any(modules[fqn] is not m for fqn, m in host.modules.items()):
            host.adopt(modules, acts=bool(self.active) or with_rows)
            self.look_on()
        elif self.guard.above_changed():
            self.look_on()
        self.guard.look_above()
        host.follow_moves()
        return with_rows

    def look_on(self) -> None:
        """Have forwards looked at as the modules that there are need it: those that checkpoint, or have code of their
        own.
        """
        self.gate.after = Recomputation(self.host.modules.values(), self.state).after
        self.gate.first = FirstForwards.of(self, self.host, self.shared)

    def look_around(self) -> None:
        """Have forwards looked at whatever modules there are: another tool's forward stands around the backbone."""
        if self.gate.first is None:
            self.gate.first = FirstForwards.of(self, self.host, self.shared, around=True)

    def before_rows(self) -> None:
        """Make the backbone ready for forwards of rows, before they are put in."""
        if not self.active:
            self.host.freeze()

    def after_rows(self) -> None:
        """Put the backbone's state back, once forwards of rows were taken out."""
        self.host.buffers.restore()
        if not self.active:
            self.host.flags.thaw()

    def remove_rows(self) -> None:
        """Take what was prepared for rows out, if it was."""
        if self.rows.remove():
            self.after_rows()

    def refuse_unplaced(self, names: Iterable[str]) -> None:
        """Raise DeltaSpecError for those of these deltas that have no values where they are."""
        unplaced(self.host.deltas, names, self.shared.planned, self.host.modules)

    def state(self) -> tuple[tuple[str, ...], dict[str, float], Any]:
        """Return all that decides which deltas a forward has: (attached, strengths, rows)."""
        return self.active, self.strengths.as_dict(), self.rows.running
