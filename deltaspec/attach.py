"""Attaching and detaching: which deltas act right now, and the state of the backbone that goes with it."""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import fx, nn

from deltaspec.combination import behind, refresh
from deltaspec.deltas import Deltas
from deltaspec.diagnostics import DeltaSpecError, Diagnostic, require_known
from deltaspec.frozen import BufferGuard, Flags
from deltaspec.library import Libraries
from deltaspec.methods import methods
from deltaspec.mixing import Mixer
from deltaspec.observe import Observation, Recorder
from deltaspec.programs import Programmer
from deltaspec.rivals import Rivals
from deltaspec.stacks import Stacks
from deltaspec.switching import Forward, Places, Program

if TYPE_CHECKING:
    from deltaspec.planned import Plan, PlannedDelta

_PROGRAMS = 1024
"""Programs that are kept at least."""


class Attachments:
    """The deltas of one backbone clone and the set of them that is attached."""

    def __init__(self, backbone: nn.Module, deltas: Deltas, plan: Plan, graph: fx.Graph | None = None) -> None:
        self.backbone, self.deltas, self.plan, self.graph = backbone, deltas, plan, graph
        self.planned = {planned.name: planned for planned in plan.deltas}
        """Those that are in memory: the plan's, and what was loaded from libraries."""
        self.order = {name: index for index, name in enumerate(self.planned)}
        """Of application, of all known names."""
        self.stacks = Stacks(deltas, self.planned)
        self.libraries = Libraries(self)
        self.active: tuple[str, ...] = ()
        self.programmer = Programmer(backbone, deltas, self.planned, graph)
        self.strengths = self.programmer.strengths
        self._programs: dict[tuple[tuple[str, ...], tuple[str, ...]], Program] = {}
        """By the active set, in the order of the spec, and those of it that are not at their full strength."""
        self._ready: dict[tuple[str, ...], Program] = {}
        """By names as they were given, checked; those of active sets that need nothing but their program."""
        self._places: dict[frozenset[int], Places] = {}
        self._rivals = Rivals(plan.deltas)
        self._derived = frozenset(planned.name for planned in plan.deltas if planned.derived is not None)
        self.unproven = set() if plan.proven else set(self.order)
        """Deltas whose sites no forward was seen to reach yet."""
        modules = self.programmer.modules.values()
        self._flags, self._buffers = Flags(modules), BufferGuard(modules)
        self.mixer = Mixer(self)

    def __deepcopy__(self, memo: dict[int, Any]) -> Attachments:
        """Copy together with the backbone; what is plain data is shared, programs are made anew."""
        twin = type(self).__new__(type(self))
        memo[id(self)] = twin
        memo[id(self.planned)], memo[id(self.order)] = dict(self.planned), dict(self.order)
        shared = ("plan", "graph", "active")
        made = ("_programs", "_ready", "_places")
        for name, value in self.__dict__.items():
            if name != "mixer":
                twin.__dict__[name] = value if name in shared else {} if name in made else copy.deepcopy(value, memo)
        twin.mixer = Mixer(twin)
        twin._flags.moved = twin._buffers.moved = True
        return twin

    def switch(self, names: tuple[str, ...]) -> bool:
        """Make exactly these deltas act at full strength, in whatever order, if they did before; tell whether.

        The cost is a dictionary entry a host; it does not depend on how many deltas there are.
        """
        try:
            new = self._ready.get(names)
        except TypeError:  # What has no hash is no name.
            return False
        if new is None or self.strengths:
            return False
        if new.names != self.active:
            self._exchange(new)
        elif not names:
            self.disarm()
        return True

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
        with self.libraries.in_memory(names):
            wanted = tuple(sorted(set(names), key=self.order.__getitem__))
            scaled = tuple(name for name in wanted if values.get(name, 1.0) != 1.0)
            self.refuse_strengths(scaled)
            new = self.program(wanted, scaled)
            self.derive(name for name in wanted if name not in self.active or name in anew)
            old = self._current()
            self.strengths.set({name: values[name] for name in scaled})
            if new is not old:
                self._exchange(new, old)
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

    def discard(self, name: str) -> None:
        """Forget such a delta, which is not attached; its name stays known."""
        _forget(self._programs, name)
        _forget(self._ready, name)
        del self.planned[name]
        self.programmer.discard(name)
        self._rivals.discard(name)
        self.unproven.discard(name)

    def _current(self) -> Program:
        return self.program(self.active, self.strengths.scaled(self.active))

    def _exchange(self, new: Program, old: Program | None = None) -> None:
        """Put one program in the place of another, and the backbone's state with it."""
        old = self._current() if old is None else old
        armed = self.mixer.disarm()
        if old.names or armed:
            self._buffers.restore()
        else:
            self._buffers.watch()
            self._flags.freeze()
        new.install(old)
        self.active = new.names
        self.libraries.touch(new.names)
        if not new.names:
            self._flags.thaw()
        elif armed:
            self.mixer.arm()

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
        if findings := [_no_strength(p) for p in planned if methods()[p.method].virtual_tokens(p.params)]:
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
        """Give the names of the attached derived deltas whose sources have changed since they were computed."""
        return behind(self.backbone, self.deltas, self.plan, [name for name in self.active if name in self._derived])

    def program(self, names: tuple[str, ...], scaled: tuple[str, ...] = ()) -> Program:
        """Give the program of an active set, made and checked at its first use."""
        found = self._programs.get((names, scaled))
        if found is None:
            self.refuse_rivals(names)
            watch = None if self.unproven.isdisjoint(names) else self._watched
            found = self.programmer.build(names, watch, scaled)
            found.settle(names, self._places)
            self._programs[names, scaled] = found
            self._bound(self._programs)
        return found

    def rebind(self) -> None:
        """Bind tensors anew after they were moved, cast or replaced."""
        armed = self.mixer.disarm()
        old = self._current()
        self._programs.clear()
        self._ready.clear()
        self.mixer.forget()
        self._flags.moved = self._buffers.moved = True
        self._current().install(old)
        if armed:
            self.mixer.arm()

    def original_forward(self, fqn: str) -> Forward | None:
        """Give the instance-level forward that a module of the backbone had before any delta (None: it had none)."""
        return self.programmer.originals.get(fqn)

    def trained_in_backbone(self) -> set[str]:
        """Give the names of the backbone parameters that are in training whenever nothing is attached."""
        thawed = {id(p) for p in self._flags.thawed()}
        return {name for name, p in self.backbone.named_parameters() if id(p) in thawed}

    def prove_reached(self, seen: dict[str, Observation], names: Iterable[str]) -> None:
        """Refuse, after their first forward, deltas whose modules' weights are read around them (DS437)."""
        names, findings = tuple(names), []
        for name in names:
            for visit in self.programmer.visits_of(name):
                fqn, found = visit.planned.site.row.fqn, seen[visit.planned.site.row.fqn]
                around = found.host is not None and (not found.called or methods()[visit.method].promises.weight)
                if around and visit.planned.site.host is None:
                    how = "besides calling it" if found.called else "without calling it"
                    message = (
                        f"delta {name!r} is bypassed: {found.host or 'the model'} reads the weights of {fqn} {how}"
                    )
                    hint = "pass example_inputs to compile, so that the plan puts the delta on the weight or refuses it"
                    findings.append(Diagnostic("DS437", message, suggestion=hint))
        if findings:
            raise DeltaSpecError(findings)
        self.unproven.difference_update(names)

    def require_proof(self) -> None:
        """Refuse to be traced (torch.compile, torch.export) before any forward proved the active sites (DS440)."""
        if not self.unproven.isdisjoint(self.active):
            message = "no forward has shown yet that the attached deltas are reached, and a trace cannot show it"
            hint = "pass example_inputs to deltaspec.compile, or call the model once before torch.compile or export"
            raise DeltaSpecError([Diagnostic("DS440", message, suggestion=hint)])

    def _watched(self, forward: Forward) -> Forward:
        return FirstForward(self, forward).run


class FirstForward:
    """Watches the first forward of a model whose sites no example inputs could prove, then takes itself out."""

    def __init__(self, attachments: Attachments, base: Forward) -> None:
        self._attachments, self._base = attachments, base

    def run(self, *args: Any, **kwargs: Any) -> Any:
        """Run the model, once under observation."""
        if torch.compiler.is_compiling():
            raise RuntimeError(
                "deltaspec DS440: pass example_inputs to deltaspec.compile, or call the model once first"
            )
        recorder = Recorder(self._attachments.backbone)
        with recorder.recording():
            output = self._base(*args, **kwargs)
        self._attachments.prove_reached(recorder.result(), self._attachments.active)
        self._attachments.rebind()
        return output


def _no_strength(planned: PlannedDelta) -> Diagnostic:
    message = f"delta {planned.name!r} has no strength between none and all: {planned.method} adds tokens to the input"
    return Diagnostic("DS446", message, suggestion="attach it at strength 1, or leave it out")


def _forget(programs: dict[Any, Program], name: str) -> None:
    for key in [key for key, program in programs.items() if name in program.names]:
        del programs[key]
