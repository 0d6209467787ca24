"""Attaching and detaching: which deltas act right now, and the state of the backbone that goes with it."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import fx, nn

from deltaspec.combination import behind, refresh
from deltaspec.deltas import Deltas
from deltaspec.diagnostics import DeltaSpecError, Diagnostic
from deltaspec.frozen import BufferGuard, Flags
from deltaspec.methods import methods
from deltaspec.observe import Observation, Recorder
from deltaspec.programs import Programmer
from deltaspec.switching import Forward, Places, Program

if TYPE_CHECKING:
    from deltaspec.planned import Plan


class Attachments:
    """The deltas of one backbone clone and the set of them that is attached."""

    def __init__(self, backbone: nn.Module, deltas: Deltas, plan: Plan, graph: fx.Graph | None = None) -> None:
        self.backbone, self.deltas, self.plan, self.graph = backbone, deltas, plan, graph
        self.order = {planned.name: index for index, planned in enumerate(plan.deltas)}
        self.active: tuple[str, ...] = ()
        self._programmer = Programmer(backbone, deltas, plan, graph)
        self._programs: dict[tuple[str, ...], Program] = {}
        """By the active set, in the order of the spec."""
        self._ready: dict[tuple[str, ...], Program] = {}
        """By names as they were given, checked; those of active sets that need nothing but their program."""
        self._places: dict[frozenset[int], Places] = {}
        self._replaced, self._weights = _replaced(plan), _weights(plan)
        self._reading = any(weights.reads for weights in self._weights.values())
        self._derived = frozenset(planned.name for planned in plan.deltas if planned.derived is not None)
        self._unproven = set() if plan.proven else set(self.order)
        """Deltas whose sites no forward was seen to reach yet."""
        modules = self._programmer.modules.values()
        self._flags, self._buffers = Flags(modules), BufferGuard(modules)

    def __deepcopy__(self, memo: dict[int, Any]) -> Attachments:
        """Copy together with the backbone; what is plain data is shared, programs are made anew."""
        twin = type(self).__new__(type(self))
        memo[id(self)] = twin
        shared = ("plan", "order", "graph", "active", "_replaced", "_weights", "_reading")
        made = ("_programs", "_ready", "_places")
        for name, value in self.__dict__.items():
            twin.__dict__[name] = value if name in shared else {} if name in made else copy.deepcopy(value, memo)
        twin._flags.moved = twin._buffers.moved = True
        return twin

    def switch(self, names: tuple[str, ...]) -> bool:
        """Make exactly these deltas act, in whatever order they are given, if they did before; tell whether.

        The cost is a dictionary entry a host; it does not depend on how many deltas there are.
        """
        try:
            new = self._ready.get(names)
        except TypeError:  # What has no hash is no name.
            return False
        if new is None:
            return False
        if new.names != self.active:
            self._exchange(new)
        return True

    def activate(self, names: Iterable[str], anew: Collection[str] = ()) -> None:
        """Make exactly these deltas act. `names` are known and may come in any order.

        Derived ones that did not act, and those in `anew`, are computed from their sources as they are now. Whatever
        raises leaves the deltas that acted acting.
        """
        names = tuple(names)
        if self.switch(names):
            return
        wanted = tuple(sorted(set(names), key=self.order.__getitem__))
        new = self.program(wanted)
        self.derive(name for name in wanted if name not in self.active or name in anew)
        if wanted != self.active:
            self._exchange(new)
        if self._derived.isdisjoint(wanted):
            self._ready[names] = self._ready[wanted] = new

    def _exchange(self, new: Program) -> None:
        """Put one program in the place of another, and the backbone's state with it."""
        old = self.program(self.active)
        if old.names:
            self._buffers.restore()
        else:
            self._buffers.watch()
            self._flags.freeze()
        new.install(old)
        self.active = new.names
        if not new.names:
            self._flags.thaw()

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

    def program(self, names: tuple[str, ...]) -> Program:
        """Give the program of an active set, made and checked at its first use."""
        found = self._programs.get(names)
        if found is None:
            if len(names) > 1 and (self._replaced or self._reading):
                self._refuse_rivals(names)
            watch = None if self._unproven.isdisjoint(names) else self._watched
            found = self._programmer.build(names, watch)
            found.settle(names, self._places)
            self._programs[names] = found
        return found

    def rebind(self) -> None:
        """Bind tensors anew after they were moved, cast or replaced."""
        old = self.program(self.active)
        self._programs.clear()
        self._ready.clear()
        self._flags.moved = self._buffers.moved = True
        self.program(self.active).install(old)

    def original_forward(self, fqn: str) -> Forward | None:
        """Give the instance-level forward that a module of the backbone had before any delta (None: it had none)."""
        return self._programmer.originals.get(fqn)

    def trained_in_backbone(self) -> set[str]:
        """Give the names of the backbone parameters that are in training whenever nothing is attached."""
        thawed = {id(p) for p in self._flags.thawed()}
        return {name for name, p in self.backbone.named_parameters() if id(p) in thawed}

    def prove_reached(self, seen: dict[str, Observation]) -> None:
        """Refuse, after their first forward, attached deltas whose modules' weights are read around them (DS437)."""
        findings = []
        for name in self.active:
            for visit in self._programmer.visits_of(name):
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
        self._unproven.difference_update(self.active)
        self.rebind()

    def require_proof(self) -> None:
        """Refuse to be traced (torch.compile, torch.export) before any forward proved the active sites (DS440)."""
        if not self._unproven.isdisjoint(self.active):
            message = "no forward has shown yet that the attached deltas are reached, and a trace cannot show it"
            hint = "pass example_inputs to deltaspec.compile, or call the model once before torch.compile or export"
            raise DeltaSpecError([Diagnostic("DS440", message, suggestion=hint)])

    def _watched(self, forward: Forward) -> Forward:
        return FirstForward(self, forward).run

    def _refuse_rivals(self, wanted: tuple[str, ...]) -> None:
        """Refuse two deltas at once of which one would not see, or would drop, what the other does to a weight."""
        findings = []
        weighty = [name for name in wanted if name in self._weights]
        for a, b in itertools.combinations(weighty, 2) if self._reading else ():
            if both := self._weights[b].misses(self._weights[a]):
                message = f"delta {b!r} computes from the weight of {min(both)}, which delta {a!r} before it changes"
                findings.append(Diagnostic("DS436", message, suggestion=f"attach one of them: c.only({b!r})"))
        for a, b in itertools.combinations([name for name in wanted if name in self._replaced], 2):
            if both := self._replaced[a] & self._replaced[b]:
                message = f"deltas {a!r} and {b!r} both replace {min(both)}"
                hint = f"attach one of them: c.only({a!r})"
                findings.append(Diagnostic("DS436", message, suggestion=hint))
        if findings:
            raise DeltaSpecError(findings)


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
        self._attachments.prove_reached(recorder.result())
        return output


def _replaced(plan: Plan) -> dict[str, frozenset[str]]:
    """Give the FQNs of the parameters that each replacing delta replaces."""
    return {
        delta.name: frozenset(f"{site.site.row.fqn}.{spec.name}" for site in delta.sites for spec in site.tensors)
        for delta in plan.deltas
        if methods()[delta.method].promises.weight == "replace"
    }


@dataclass(frozen=True, slots=True)
class _Weights:
    """What one weight-expressible delta does with the weights of its sites, as FQNs of modules."""

    called: frozenset[str]
    """Changed around the module's call."""
    folded: frozenset[str]
    """Changed by folding into the weight."""
    reads: frozenset[str]
    """Computed from."""

    def misses(self, before: _Weights) -> frozenset[str]:
        """Give the sites at which it would not see what a delta before it does to the weight; both fold, it does."""
        return self.reads & (before.called | (before.folded - self.folded))


def _weights(plan: Plan) -> dict[str, _Weights]:
    found = {}
    for delta in plan.deltas:
        method = methods()[delta.method]
        if method.promises.weight is not None:
            folded = {s.site.row.fqn for s in delta.sites if method.folds(s.site, s.params)}
            reads = {s.site.row.fqn for s in delta.sites if method.reads_weight(s.site, s.params)}
            called = {s.site.row.fqn for s in delta.sites} - folded
            found[delta.name] = _Weights(frozenset(called), frozenset(folded), frozenset(reads))
    return found
