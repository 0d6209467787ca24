"""The compiled model: a transformed GraphModule over a clone of the backbone, whose deltas attach and detach."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from os import PathLike
from types import MappingProxyType, TracebackType
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import fx, nn

from deltaspec.attach import Attachments
from deltaspec.capture import Entry, root_graph
from deltaspec.clone import clone
from deltaspec.deltas import Delta, Deltas, find
from deltaspec.diagnostics import DeltaSpecError, Diagnostic, closest
from deltaspec.generation import generating
from deltaspec.symbolic import trace

if TYPE_CHECKING:
    from deltaspec.planned import Plan
    from deltaspec.regions import Region


class UnknownDeltaError(DeltaSpecError, KeyError):
    """A name that is not the name of a delta of this model."""


class _Restore:
    """What `only` and `detached` give: nothing to do with, or a context that puts the active set back at its end."""

    __slots__ = ("_attachments", "_before")

    def __init__(self, attachments: Attachments, before: tuple[str, ...]) -> None:
        self._attachments, self._before = attachments, before

    def __enter__(self) -> None:
        return None

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        self._attachments.activate(self._before)


class CompiledModel(torch.fx.GraphModule):
    """A backbone with its deltas. Made by `deltaspec.compile`.

    Call it as the backbone is called. Attributes that it does not have itself (`config`, `generate`, `device` …) are
    the backbone's.
    """

    def __init__(self, backbone: nn.Module, attachments: Attachments, capture: str, capture_reason: str) -> None:
        graph, through_entry = root_graph(backbone)
        root: dict[str, Any] = {"backbone": backbone}
        if through_entry:
            root["entry"] = Entry(backbone)
        super().__init__(root, graph, class_name="CompiledModel")
        if through_entry:
            # The graph calls `entry` only, so GraphModule took only that; the keys are to be the backbone's.
            self.add_module("backbone", backbone)
        self.training = backbone.training
        self.__dict__["_attachments"] = attachments
        self.__dict__["capture"] = capture
        self.__dict__["capture_reason"] = capture_reason

    # What there is

    @property
    def plan(self) -> Plan:
        """The plan that this model was compiled from."""
        plan: Plan = self._attachments.plan
        return plan

    @property
    def attached(self) -> tuple[str, ...]:
        """Names of the attached deltas, in the order in which they apply."""
        active: tuple[str, ...] = self._attachments.active
        return active

    @property
    def deltas(self) -> Mapping[str, Delta]:
        """All deltas by name, attached or not."""
        return MappingProxyType(self._attachments.deltas._modules)

    @property
    def regions(self) -> Mapping[str, Region]:
        """The rewritten regions of the active set, by the FQN of the module each belongs to ("": the whole model)."""
        return MappingProxyType(self._attachments.program(self.attached).regions)

    def trainable_parameters(self) -> Iterator[nn.Parameter]:
        """Yield the parameters that training would change now: those of the attached deltas."""
        for name in self.attached:
            yield from (p for p in self.deltas[name].parameters() if p.requires_grad)

    # Attach and detach

    def attach(self, *names: str) -> Self:
        """Attach deltas by name, or all; attached ones stay. Raises UnknownDeltaError."""
        if not self._attachments.switch((*self.attached, *(names or self._known(names)))):
            self._attachments.activate((*self.attached, *self._known(names)), anew=self._known(names))
        return self

    def detach(self, *names: str) -> Self:
        """Detach deltas by name, or all; detached ones stay so. Raises UnknownDeltaError."""
        gone = set(self._known(names)) if names else self.attached
        self._attachments.activate(tuple(name for name in self.attached if name not in gone))
        return self

    def only(self, *names: str) -> _Restore:
        """Attach exactly these deltas, at once; in a `with`, what was attached before comes back, on an error too."""
        attachments = self._attachments
        restore = _Restore(attachments, attachments.active)
        if not attachments.switch(names):
            attachments.activate(self._known(names) if names else (), anew=names)
        return restore

    def detached(self) -> _Restore:
        """Detach all deltas, at once; in a `with`, what was attached before comes back, on an error too."""
        return self.only()

    def refresh(self, *names: str) -> Self:
        """Compute derived deltas, by name or all, from their sources as they are now, as `attach` and `only` do."""
        self._attachments.derive(self._known(names))
        return self

    def _known(self, names: tuple[str, ...]) -> tuple[str, ...]:
        known = self._attachments.order
        if wrong := [name for name in names if not isinstance(name, str)]:
            raise TypeError(f"names of deltas are given one by one, as in attach('a', 'b'), not {wrong[0]!r}")
        if unknown := [name for name in names if name not in known]:
            raise UnknownDeltaError([_unknown_delta(name, tuple(known)) for name in unknown])
        return names or tuple(known)

    # Files and other forms

    def save(self, directory: str | PathLike[str]) -> None:
        """Write every delta (safetensors, resolved spec, lock) to a directory; see `deltaspec.store`."""
        from deltaspec.store import save

        save(self, directory)

    def load(self, directory: str | PathLike[str]) -> Self:
        """Read the tensors of saved deltas into this model; see `deltaspec.store`. All or nothing."""
        from deltaspec.store import load

        load(self, directory)
        return self

    def merge(self, *names: str) -> nn.Module:
        """Give a new plain model of the original class with these deltas, or all attached ones, folded in."""
        from deltaspec.merge import merge

        return merge(self._attachments, self._known(names) if names else self.attached)

    def simplified(self, *names: str) -> CompiledModel:
        """Give a new compiled model in which these deltas (or all) are without what only their training needed.

        A prefix then has its keys and values alone, and p_tuning is a soft prompt; both compute what they did. The
        other deltas are copied, the backbone's storage is shared. Raises UnknownDeltaError.
        """
        from deltaspec.compiler import compile_plan
        from deltaspec.merge import without_deltas
        from deltaspec.simplify import copy_tensors, simplify

        plan = simplify(self.plan, self._known(names))
        plain = without_deltas(self._attachments)
        for name in self._attachments.trained_in_backbone():
            plain.get_parameter(name).requires_grad = True
        twin = compile_plan(plain, plan, self.capture)
        copy_tensors(self.plan, plan, self.deltas, twin.deltas)
        twin.only(*self.attached)
        return twin

    def export(self, *args: Any, **options: Any) -> torch.export.ExportedProgram:
        """Export the model with its attached deltas: `torch.export.export(self.backbone, …)`, same arguments."""
        self._attachments.require_proof()
        return torch.export.export(self.backbone, *args, **options)

    # Being a module

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            modules = self.__dict__.get("_modules", {})
            if "backbone" not in modules:
                raise
            if name == "generate" and hasattr(modules["backbone"], name):
                return generating(self.plan, self.attached, modules["backbone"])
            return getattr(modules["backbone"], name)

    def __deepcopy__(self, memo: dict[int, Any]) -> CompiledModel:
        backbone = copy.deepcopy(self.backbone, memo)
        found = find(backbone)
        assert found is not None
        twin = CompiledModel(backbone, found[1].attachments, self.capture, self.capture_reason)
        memo[id(self)] = twin
        twin._copy_own_state(self, memo)
        return twin

    def _copy_own_state(self, other: CompiledModel, memo: dict[int, Any]) -> None:
        """Carry over what users put on the root itself: hooks, flags, attributes."""
        made = ("_modules", "_parameters", "_buffers", "_graph", "_code", "_attachments", "_lineno_map", "meta")
        for name, value in other.__dict__.items():
            if name not in made:
                self.__dict__[name] = copy.deepcopy(value, memo)

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle the backbone without its installed forwards; they are built anew when it is loaded."""
        attachments = self._attachments
        twin = clone(self.backbone, replace={id(attachments): None})
        for fqn, module in twin.named_modules():
            module.__dict__.pop("forward", None)
            if attachments.original_forward(fqn) is not None:
                message = (
                    f"{fqn or 'the model'} has a forward of its own (another library's hook), which cannot be pickled"
                )
                hint = "remove the hook first (accelerate: remove_hook_from_module), or use c.save(dir)"
                raise DeltaSpecError([Diagnostic("DS433", message, suggestion=hint)])
        for name in attachments.trained_in_backbone():
            twin.get_parameter(name).requires_grad = True
        return _rebuild, (twin, attachments.plan, self.attached, self.capture, self.capture_reason, self.training)


def _rebuild(
    backbone: nn.Module, plan: Plan, attached: tuple[str, ...], capture: str, capture_reason: str, training: bool
) -> CompiledModel:
    found = find(backbone)
    assert found is not None
    graph = trace(backbone, *places(plan))[0] if capture == "symbolic" else None
    compiled = assemble(backbone, found[1], plan, graph, capture, capture_reason)
    compiled.training = training
    compiled._attachments.activate(attached)
    return compiled


def assemble(
    backbone: nn.Module, deltas: Deltas, plan: Plan, graph: fx.Graph | None, capture: str, reason: str
) -> CompiledModel:
    """Make a compiled model of a backbone that holds its deltas already; nothing is attached yet."""
    attachments = Attachments(backbone, deltas, plan, graph)
    deltas.attachments = attachments
    return CompiledModel(backbone, attachments, capture, reason)


def places(plan: Plan) -> tuple[set[str], set[str]]:
    """Give the FQNs of all sites, and of the modules whose forwards their deltas need."""
    sites = [site.site for delta in plan.deltas for site in delta.sites]
    return {s.row.fqn for s in sites}, {s.row.fqn if s.host is None else s.host for s in sites}


def _unknown_delta(name: str, known: tuple[str, ...]) -> Diagnostic:
    near = closest(name, known)
    hint = f"did you mean {near!r}? " if near else ""
    return Diagnostic("DS434", f"no delta is named {name!r}", suggestion=f"{hint}known: {', '.join(known) or 'none'}")
