"""The compiled model: a transformed GraphModule over a clone of the backbone, whose deltas attach and detach."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from os import PathLike
from types import MappingProxyType, MethodType
from typing import Any, Self

import torch

from deltaspec.backbone.copying import copy_held, deep_copy
from deltaspec.compiler.build import Built, build, with_rows
from deltaspec.compiler.face import Face, attribute, take_backbone_names
from deltaspec.compiler.files import Files
from deltaspec.compiler.found import leave_word
from deltaspec.compiler.handles import Restore, known_names
from deltaspec.compiler.membership import add, remove
from deltaspec.compiler.optimizing import Optimizing
from deltaspec.compiler.pickling import rebuild, reduced
from deltaspec.compiler.standard_verbs import install
from deltaspec.diagnostics.findings import require_known
from deltaspec.graphs.regions import Region
from deltaspec.graphs.root import DELTAS, Entry, root_graph
from deltaspec.language.model import DeltaSpec
from deltaspec.library.libraries import Libraries
from deltaspec.planning.plan import Plan
from deltaspec.runtime.active import Active
from deltaspec.runtime.copies import beside, without_deltas
from deltaspec.runtime.forward_gate import through
from deltaspec.runtime.generation import generating
from deltaspec.runtime.host import Host
from deltaspec.runtime.shared import Shared
from deltaspec.serving.assignment import Rows, checked_strength
from deltaspec.serving.mixer import Mixer
from deltaspec.transforms.simplify import copy_tensors, simplify


class CompiledModel(Face, Files, Optimizing, torch.fx.GraphModule):
    """A backbone with its deltas. Made by `deltaspec.compile`.

    Call it as the backbone is called. Attributes that it does not have itself (`config`, `generate`, `device` …) are
    the backbone's.

    Threads: any number may run forwards at once, all under what is attached. A switch (`attach`, `detach`, `only`, and
    what else changes the active set) raises DeltaSpecError (DS456) while a forward runs, in whatever thread, and a
    forward with rows (`deltas=`) runs alone, or raises it (DS445). Threads that need different deltas at once each take
    a `view()`.
    """

    _built: Built
    _active: Active
    _shared: Shared
    _host: Host
    _libraries: Libraries
    _rows: Mixer

    def __init__(self, built: Built, capture: str, capture_reason: str) -> None:
        backbone = built.host.backbone
        super().__init__({"entry": Entry(backbone, built.rows)}, root_graph(backbone), class_name="CompiledModel")
        # The graph calls `entry` only, so GraphModule took only that; the keys are to be the backbone's.
        self.add_module("backbone", backbone)
        self.training = backbone.training
        self.__dict__.update({f"_{name}": part for name, part in built._asdict().items()}, _built=built)
        self._shared.captured = capture, capture_reason
        self.register_load_state_dict_pre_hook(take_backbone_names)  # type: ignore[no-untyped-call]
        install(built)
        leave_word(built, self, _again)

    # What there is

    @property
    def plan(self) -> Plan:
        """The plan that this model was compiled from."""
        return self._shared.plan

    @property
    def capture(self) -> str:
        """How the backbone was captured: `modules` or `symbolic`; see `deltaspec.compile`."""
        return self._shared.captured[0]

    @property
    def capture_reason(self) -> str:
        """Why it was captured so."""
        return self._shared.captured[1]

    @property
    def attached(self) -> tuple[str, ...]:
        """Names of the attached deltas, in the order in which they apply."""
        return self._active.active

    @property
    def strengths(self) -> Mapping[str, float]:
        """How strong each attached delta is; 1 is what was trained."""
        return {name: self._active.strengths[name] for name in self.attached}

    @property
    def regions(self) -> Mapping[str, Region]:
        """The rewritten regions of the active set, by the FQN of the module each belongs to ("": the whole model)."""
        return MappingProxyType(self._active.program(self.attached).regions)

    # Deltas come and go

    def add(self, spec: str | PathLike[str] | Mapping[str, Any] | DeltaSpec, *, example_inputs: Any = None) -> Self:
        """Plan a spec onto the backbone, and add its deltas to this model; those that are there are not touched.

        Their tensors stay the objects that they are, bits, gradients and the states of optimizers included, and what is
        attached stays so. New deltas apply after them; in this view they attach as the spec says, other views have
        them detached. From then on this is a model that was compiled with all these specs. Derived deltas may be built
        from deltas that are there. `example_inputs` as for `compile`. Raises DeltaSpecError with all findings, and in a
        forward (DS456); then everything is as it was.
        """
        add(self._built, spec, example_inputs)
        return self

    def remove(self, *names: str) -> Self:
        """Take deltas out of this model, and of all its views, for good: they are detached, and let go of.

        Rows that name them are refused. Raises UnknownDeltaError, DeltaSpecError for deltas that others are derived
        from (DS486) or that a library holds (DS488), and while a forward runs in any view (DS456); then everything is
        as it was.
        """
        if not names:
            raise TypeError("name the deltas to remove, as in remove('a', 'b')")
        remove(self._built, known_names(self._shared, names))
        return self

    # Attach and detach

    def attach(self, *names: str, strength: float | None = None) -> Self:
        """Attach deltas by name, or all; attached ones stay. Raises UnknownDeltaError.

        `strength` scales what these add: 0 is as if they were not there, 1, the default, what was trained; other finite
        numbers lie between or beyond. It is data: changing it rebuilds and recompiles nothing. Raises DeltaSpecError
        (DS446) where a method has none.
        """
        with self._host.gate.lock:
            if strength is None and self._active.switch((*self.attached, *(names or known_names(self._shared, names)))):
                return self
            known, strengths = known_names(self._shared, names), self._active.strengths.as_dict()
            if strength is not None:
                strengths |= {name: checked_strength(name, strength) for name in known}
            self._active.activate((*self.attached, *known), anew=known, strengths=strengths)
        return self

    def detach(self, *names: str) -> Self:
        """Detach deltas by name, or all; detached ones stay so. Raises UnknownDeltaError."""
        with self._host.gate.lock:
            gone = set(known_names(self._shared, names)) if names else self.attached
            left = tuple(name for name in self.attached if name not in gone)
            self._active.activate(left, strengths=self._active.strengths.as_dict(left))
        return self

    def only(self, *names: str | Mapping[str, float]) -> Restore:
        """Attach exactly these deltas, at once; in a `with`, what was attached before comes back, on an error too.

        Names, or one dict of names and strengths: `c.only({"french": 0.7, "legal": 0.3})`; see `attach`.
        """
        restore = Restore(self._active)
        if not self._active.switch(names):
            given = names[0] if len(names) == 1 and isinstance(names[0], Mapping) else None
            asked: tuple[Any, ...] = names if given is None else tuple(given)
            wanted = known_names(self._shared, asked) if asked else ()
            values = () if given is None else zip(wanted, given.values(), strict=True)
            strengths = {name: checked_strength(name, value) for name, value in values}
            self._active.activate(wanted, anew=wanted, strengths=strengths)
        return restore

    def detached(self) -> Restore:
        """Detach all deltas, at once; in a `with`, what was attached before comes back, on an error too."""
        return self.only()

    def refresh(self, *names: str) -> Self:
        """Compute derived deltas, by name or all, from their sources as they are now, as `attach` and `only` do."""
        self._active.derived.refresh(known_names(self._shared, names))
        return self

    # A delta for each row of a batch

    def rows(self, deltas: Sequence[Any], *, among: Sequence[str] = ()) -> Rows:
        """Turn an assignment of deltas to rows into tensors, to be passed as `deltas=`.

        One entry a row: None (the bare backbone), a name, a tuple of names, or a dict of names and strengths; deltas of
        one row apply in the order of the spec. `c(**batch, deltas=[...])` and `c.generate(..., deltas=[...])` take the
        list itself; under torch.compile they take what this makes of it, outside of the compiled code, since the
        assignment is then data: one graph serves all that use the same kinds of deltas (method, sites and shapes), and
        those that `among` names are counted as used. Until the next `detach()` the model stays prepared for rows.

        Raises UnknownDeltaError, DeltaSpecError (DS441) for deltas that cannot be mixed, TypeError, ValueError.
        """
        rows: Rows = self._rows.rows(deltas, among)
        self._rows.prepare()
        return rows

    def _generate(self, *args: Any, deltas: Sequence[Any] | Rows | None = None, **kwargs: Any) -> Any:
        """Generate as the backbone does, each row under its own deltas if `deltas` says so; see `rows`."""
        if deltas is None:
            with self._host.gate.forwards():
                return generating(self._shared.planned, self.attached, self.backbone)(*args, **kwargs)
        rows = deltas if isinstance(deltas, Rows) else self._rows.rows(deltas)
        with self._rows.using(rows, args, kwargs, keep=True):
            return generating(self._shared.planned, rows.places, self.backbone)(*args, **kwargs)

    # Views

    def view(self) -> CompiledModel:
        """Return another compiled model over the same weights and the same deltas, with its own active set.

        It takes milliseconds and no memory for weights; buffers are copied. It starts with what is attached here, at
        the same strengths; from then on each view attaches, detaches and mixes rows on its own, so that threads that
        serve or train different deltas at once get what they get alone. The deltas' parameters are the same objects:
        what is trained, loaded or opened (`library`) through one view is so for all. While there are several views none
        can be moved or cast: that raises DeltaSpecError (DS455).
        """
        with self._host.gate.lock, self._shared.lock:
            built = with_rows(beside(self._active), self._shared, self._libraries)
            made = CompiledModel(built, self.capture, self.capture_reason)
            mine, others = self._host.modules, made._host.modules
            made._copy_own_state(self, {id(module): others[fqn] for fqn, module in mine.items()})
            built.active.follow(self._active)
        return made

    # Other forms

    def simplified(self, *names: str) -> CompiledModel:
        """Return a new compiled model in which these deltas (or all) are without what only their training needed.

        A prefix then has its keys and values alone, and p_tuning is a soft prompt; both compute what they did. The
        other deltas are copied, the backbone's storage is shared. Raises UnknownDeltaError.
        """
        require_known(names, [delta.name for delta in self.plan.deltas])
        self._libraries.refuse_attached(self.attached, "simplified")
        plan = simplify(self.plan, known_names(self._shared, names))
        plain = without_deltas(self._host)
        for name in self._host.trained_in_backbone():
            plain.get_parameter(name).requires_grad = True
        asked = self.capture if self.capture_reason.startswith("asked for") else "auto"
        twin = CompiledModel(*build(plain, plan, asked, trained=self._host.trained))
        copy_tensors(self.plan, plan, self.deltas, twin.deltas)
        twin.only(*self.attached)
        return twin

    # Being a module

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            modules = self.__dict__.get("_modules", {})
            if "backbone" not in modules:
                raise
            found = attribute(modules["backbone"], name)
            return self._generate if name == "generate" else found

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if name == "forward":
            self.__dict__["_call_impl"] = MethodType(_counted, self)

    def __deepcopy__(self, memo: dict[int, Any]) -> CompiledModel:
        deep_copy(self.backbone, memo)
        built = copy.deepcopy(self._built, memo)  # copied with the backbone, all of it
        twin = CompiledModel(built, self.capture, self.capture_reason)
        built.active.follow_others()  # what was copied of the forwards is made anew
        built.host.deltas.own()
        memo[id(self)] = twin
        twin._copy_own_state(self, memo)
        return twin

    def _copy_own_state(self, other: CompiledModel, memo: dict[Any, Any]) -> None:
        """Carry over what users put on the root itself: hooks, flags, attributes."""
        memo |= {id(other): self, id(other.backbone): self.backbone}
        made = {"_modules", "_parameters", "_buffers", "_graph", "_code", "_lineno_map", "meta", "_built"}
        made |= {"_compiled_call_impl"} | {f"_{part}" for part in Built._fields}
        for name, value in other.__dict__.items():
            if name not in made:
                self.__dict__[name] = copy_held(value, other, memo)

    def __reduce__(self) -> tuple[Any, ...]:
        # fx makes a class for each GraphModule, so the class is named here.
        return rebuild, (CompiledModel, *reduced(self._built), self.capture, self.capture_reason, self.training)


def _counted(self: CompiledModel, *args: Any, **kwargs: Any) -> Any:
    """Run the hooks and another tool's forward, counted: it may call any part of the backbone, and go around others."""
    run = torch.fx.GraphModule._call_impl
    if "forward" not in self.__dict__ or kwargs.get(DELTAS) is not None or torch.compiler.is_compiling():
        return run(self, *args, **kwargs)  # type: ignore[no-untyped-call]
    self._active.look_around()
    return through(self._host.gate, self, run, args, kwargs)


def _again(built: Built) -> CompiledModel:
    """Return a compiled model of the same parts, where the first one is gone and only its backbone was kept."""
    return CompiledModel(built, *built.shared.captured)
