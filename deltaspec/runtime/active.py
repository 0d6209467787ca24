"""Attaching and detaching: which deltas act right now, and the state of the backbone that goes with it."""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from deltaspec.backbone.frozen import BufferGuard, Flags
from deltaspec.deltas.stacks import Stacks
from deltaspec.planning.conflicts import Rivals
from deltaspec.runtime.checkpointing import Recomputation
from deltaspec.runtime.forward_gate import ForwardGate, install
from deltaspec.runtime.program_builder import ProgramBuilder
from deltaspec.runtime.proving import FirstForward
from deltaspec.runtime.shared import Family, Known

if TYPE_CHECKING:
    from torch import Tensor, fx, nn

    from deltaspec.deltas.modules import Delta, Deltas
    from deltaspec.planning.plan import Plan
    from deltaspec.planning.planned import PlannedDelta
    from deltaspec.runtime.ports import Ports
    from deltaspec.runtime.program import Forward, Places, Program


_PROGRAMS = 1024
"""Programs that are kept at least."""


class Attachments(Known):
    """The deltas of one backbone clone and the set of them that is attached."""

    def __init__(
        self,
        backbone: nn.Module,
        deltas: Deltas,
        plan: Plan,
        graph: fx.Graph | None,
        ports: Ports,
        beside: Attachments | None = None,
    ) -> None:
        """Nothing is attached yet. `beside`: those of another view, to share what does not depend on the view."""
        self.backbone, self.deltas, self.plan, self.graph = backbone, deltas, plan, graph
        self.ports = ports
        self.gate = ForwardGate()
        self.active: tuple[str, ...] = ()
        if beside is None:
            self.family = Family()
            self.planned = {planned.name: planned for planned in plan.deltas}
            """Those that are in memory: the plan's, and what was loaded from libraries."""
            self.order = {name: index for index, name in enumerate(self.planned)}
            """Of application, of all known names."""
            self.stacks = Stacks(deltas, self.planned, self.family.is_read, self.family.is_idle)
            self.libraries = ports.residency(self.family)
            self._rivals = Rivals(plan.deltas)
            self.unproven = set() if plan.proven else set(self.order)
            """Deltas whose sites no forward was seen to reach yet."""
        else:
            self.family, self.planned, self.order = beside.family, beside.planned, beside.order
            self.stacks, self.libraries = beside.stacks, beside.libraries
            self._rivals, self.unproven = beside._rivals, beside.unproven
        self.builder = ProgramBuilder(backbone, deltas, self.planned, graph)
        self.strengths = self.builder.strengths
        self._programs: dict[tuple[tuple[str, ...], tuple[str, ...]], Program] = {}
        """By the active set, in the order of the spec, and those of it that are not at their full strength."""
        self._ready: dict[tuple[str, ...], Program] = {}
        """By names as they were given, checked; those of active sets that need nothing but their program."""
        self._installed: Program | None = None
        """That of the active set, once it is known."""
        self._places: dict[frozenset[int], Places] = {}
        self.shown: dict[str, Delta] = {}
        """Deltas of libraries, as modules of this view."""
        self._derived = frozenset(planned.name for planned in plan.deltas if planned.derived is not None)
        modules = self.builder.modules.values()
        self._flags, self._buffers = Flags(modules), BufferGuard(modules)
        self.mixer = ports.rows(self)
        self._join()

    def _join(self) -> None:
        """Take part in what is decided by thread and by view."""
        self.gate.after = Recomputation(self.builder.modules.values(), self.state).after
        self.gate.moving = self._moving
        install(self.backbone, self.gate)
        self.family.add(self)

    def _moving(self, fn: Any) -> None:
        self.family.refuse_moving(self, fn)

    def __deepcopy__(self, memo: dict[int, Any]) -> Attachments:
        """Copy together with the backbone; what is plain data is shared, programs are made anew."""
        twin = type(self).__new__(type(self))
        memo[id(self)] = twin
        memo[id(self.planned)], memo[id(self.order)] = dict(self.planned), dict(self.order)
        # A copy of a view is a model of its own.
        memo[id(self.stacks.home)] = copy.deepcopy(self.deltas, memo)
        memo[id(self.family)] = family = Family()
        shared = ("plan", "graph", "active", "ports")
        made = ("_programs", "_ready", "_places", "shown")
        for name, value in self.__dict__.items():
            if name not in ("mixer", "_installed"):
                twin.__dict__[name] = value if name in shared else {} if name in made else copy.deepcopy(value, memo)
        twin.mixer, twin._installed = self.ports.rows(twin), None
        twin.stacks.is_read, twin.stacks.is_idle = family.is_read, family.is_idle
        twin._join()
        twin._flags.moved = twin._buffers.moved = True
        return twin

    def switch(self, names: tuple[str, ...]) -> bool:
        """Make exactly these deltas act at full strength, in whatever order, if they did before; return whether.

        The cost is a dictionary entry a host; it does not depend on how many deltas there are.
        """
        try:
            new = self._ready.get(names)
        except TypeError:  # What has no hash is no name.
            return False
        if new is None:
            return False
        if new.names == self.active and (names or not self.mixer.armed) and not self.strengths:
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
                    self.disarm()
                else:
                    self._exchange(new)
            finally:
                gate.closed = closed
        # Another view may have dropped a delta of a library just before this one claimed it by `active`.
        return not self.libraries.opened or self._ready.get(names) is new

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
        with self.gate.switching(), self.family.lock, self.libraries.in_memory(names, self):
            wanted = tuple(sorted(set(names), key=self.order.__getitem__))
            scaled = tuple(name for name in wanted if values.get(name, 1.0) != 1.0)
            self.refuse_strengths(scaled)
            new = self.program(wanted, scaled)
            self.derive(name for name in wanted if name not in self.active or name in anew)
            old = self._current()
            self.strengths.set({name: values[name] for name in scaled})
            if new is not old:
                self._exchange(new)
            elif not wanted:
                self.disarm()
            if self._derived.isdisjoint(wanted) and not scaled:
                self._ready[names] = self._ready[wanted] = new
                self._bound(self._ready)

    def _bound(self, programs: dict[Any, Program]) -> None:
        """Forget the programs made first, where there are many more than deltas: each holds what it binds."""
        limit = max(_PROGRAMS, 2 * len(self.planned))
        while len(programs) > limit:
            del programs[next(names for names, program in programs.items() if program.names != self.active)]

    def add(self, planned: PlannedDelta, *, proven: bool) -> None:
        """Take in a delta that is no module of the backbone."""
        self.planned[planned.name] = planned
        self._rivals.add(planned)
        if not proven:
            self.unproven.add(planned.name)

    def discard(self, name: str) -> bool:
        """Forget such a delta, whose name stays known; return False where a view is just being switched to it."""
        views = self.family.views()
        for view in views:
            _forget(view._ready, name)
        if name in self.family.attached():
            return False
        for view in views:
            _forget(view._programs, name)
            view.shown.pop(name, None)
            view.builder.discard(name)
        del self.planned[name]
        self._rivals.discard(name)
        self.unproven.discard(name)
        return True

    def _current(self) -> Program:
        if self._installed is None:
            self._installed = self.program(self.active, self.strengths.scaled(self.active))
        return self._installed

    def _exchange(self, new: Program) -> None:
        """Put a program in the place of the current one, and the backbone's state with it."""
        old = self._installed or self._current()
        armed = self.mixer.disarm()
        if old.names or armed:
            self._buffers.restore()
        else:
            self._buffers.watch()
            self._flags.freeze()
        new.install(old)
        self.active, self._installed = new.names, new
        if self.libraries.opened:
            self.libraries.touch(new.names)
        if not new.names:
            self._flags.thaw()
        elif armed:
            self.mixer.arm()

    def follow(self, other: Attachments) -> None:
        """Attach what is attached in another view, as it is."""
        self._current()
        self.strengths.set(other.strengths.as_dict(other.active))
        self._exchange(self.program(other.active, self.strengths.scaled(other.active)))

    def state(self) -> tuple[tuple[str, ...], dict[str, float], Any]:
        """Return all that decides which deltas a forward has: (attached, strengths, rows)."""
        return self.active, self.strengths.as_dict(), self.mixer.running

    def kept_buffers(self) -> Iterator[tuple[str, str, Tensor, Tensor]]:
        """Yield what buffers will be when nothing is attached: (module's FQN, name, the buffer, its value)."""
        homes = {id(module._buffers): fqn for fqn, module in self.builder.modules.items()}
        for home, name, buffer, value in self._buffers.kept():
            yield homes[id(home)], name, buffer, value

    def buffers_without_deltas(self) -> dict[tuple[str, str], Tensor]:
        """Return what the buffers are kept as while something is attached, by module's FQN and name."""
        acting = self.active or self.mixer.armed
        return {(fqn, name): value for fqn, name, _, value in self.kept_buffers()} if acting else {}

    def prepare(self) -> None:
        """Do `arm`, unless a forward runs."""
        if not self.mixer.armed:
            with self.gate.switching():
                self.arm()

    def arm(self) -> None:
        """Make the backbone ready for rows under different deltas."""
        if not self.active and not self.mixer.armed:
            self._buffers.watch()
            self._flags.freeze()
        self.mixer.arm()

    def disarm(self) -> None:
        """Undo `arm`."""
        if self.mixer.disarm():
            self._buffers.restore()
            if not self.active:
                self._flags.thaw()

    def program(self, names: tuple[str, ...], scaled: tuple[str, ...] = ()) -> Program:
        """Return the program of an active set, made and checked at its first use."""
        found = self._programs.get((names, scaled))
        if found is None:
            self.refuse_rivals(names)
            watch = None if self.unproven.isdisjoint(names) else self._watched
            found = self.builder.build(names, watch, scaled)
            found.settle(names, self._places)
            self._programs[names, scaled] = found
            self._bound(self._programs)
        return found

    def loaded(self) -> None:
        """Keep what `load_state_dict` put into the backbone's buffers."""
        self._buffers.loaded()

    def rebind(self) -> None:
        """Bind tensors anew after they were moved, cast or replaced."""
        with self.gate.lock, self.family.lock:
            armed = self.mixer.disarm()
            old = self._current()
            self._programs.clear()
            self._ready.clear()
            self.shown.clear()
            self.mixer.forget()
            self._flags.moved = self._buffers.moved = True
            self._installed = None
            self._current().install(old)
            if armed:
                self.mixer.arm()

    def trained_in_backbone(self) -> set[str]:
        """Return the names of the backbone parameters that are in training whenever nothing is attached."""
        thawed = {id(p) for p in self._flags.thawed()}
        return {name for name, p in self.backbone.named_parameters() if id(p) in thawed}

    def _watched(self, forward: Forward) -> Forward:
        return FirstForward(self, forward).run


def _forget(programs: dict[Any, Program], name: str) -> None:
    for key in [key for key, program in programs.items() if name in program.names]:
        del programs[key]
