"""Attaching and detaching: which deltas act right now, and the forwards that make them act.

A *program* is the list of forwards of one active set. It is made once and kept, so that a switch only writes one dictionary
entry per module touched.
"""

from __future__ import annotations

import copy
import functools
import inspect
import itertools
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from types import MethodType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx, nn

from deltaspec.deltas import RESERVED, Deltas, attribute_name, storage_key
from deltaspec.diagnostics import DeltaSpecError, Diagnostic
from deltaspec.methods import methods
from deltaspec.methods._base import Form, Site
from deltaspec.observe import Observation, Recorder
from deltaspec.regions import Region, RegionKey, region
from deltaspec.rewrite import Link
from deltaspec.substitution import Fold, Lowered, Swapped, stand_in
from deltaspec.symbolic import SiteNames, compile_graph, copy_graph, rewrite_site

if TYPE_CHECKING:
    from deltaspec.planned import Plan, PlannedSite

Forward = Callable[..., Any]


@dataclass(frozen=True, slots=True)
class Visit:
    """One delta at one host module, in the order of the spec."""

    delta: str
    method: str
    planned: PlannedSite
    lowered: bool
    """Works through the host's parameters instead of around its call."""


@dataclass(slots=True)
class Program:
    """The forwards of one active set."""

    writes: list[tuple[dict[str, Any], Forward]]
    """(module's `__dict__`, its forward while this set is active)."""
    undo: list[tuple[dict[str, Any], Forward | None]]
    """(module's `__dict__`, the instance-level forward it had; None: it had none)."""
    regions: dict[str, Region]
    """By the FQN of the module."""


class Attachments:
    """The deltas of one backbone clone and the set of them that is attached."""

    def __init__(self, backbone: nn.Module, deltas: Deltas, plan: Plan, graph: fx.Graph | None = None) -> None:
        self.backbone, self.deltas, self.plan = backbone, deltas, plan
        self.graph = graph
        """The whole model's graph under the `symbolic` capture, without deltas."""
        self._traced = {str(node.target) for node in graph.nodes if node.op == "call_module"} if graph else set()
        self.order = {planned.name: index for index, planned in enumerate(plan.deltas)}
        self.active: tuple[str, ...] = ()
        self._modules = {
            name: module
            for name, module in backbone.named_modules(remove_duplicate=False)
            if name != RESERVED and not name.startswith(RESERVED + ".")
        }
        self._visits: dict[str, list[Visit]] = {}
        self._hosts: dict[str, list[str]] = {name: [] for name in self.order}
        for planned in plan.deltas:
            method = methods()[planned.method]
            for site in planned.sites:
                lowered = site.site.host is not None or method.lowers(site.site, site.params)
                host = site.site.row.fqn if site.site.host is None else site.site.host
                self._visits.setdefault(host, []).append(Visit(planned.name, planned.method, site, lowered))
                if host not in self._hosts[planned.name]:
                    self._hosts[planned.name].append(host)
        self._proven = plan.proven
        self._rivals = _rivals(plan)
        self._originals = {fqn: module.__dict__.get("forward") for fqn, module in self._modules.items()}
        self._backbone_parameters = list({id(p): p for m in self._modules.values() for p in m._parameters.values() if p is not None}.values())
        self._statistics = [fqn for fqn, module in self._modules.items() if _tracks_statistics(module)]
        self._programs: dict[tuple[str, ...], Program] = {(): Program([], [], {})}
        self._thawed: list[nn.Parameter] = []
        self._state = BufferGuard(self._modules.values())

    def __deepcopy__(self, memo: dict[int, Any]) -> Attachments:
        """Copy together with the backbone: what is plain data is shared, programs are made anew when they are next needed."""
        twin = type(self).__new__(type(self))
        memo[id(self)] = twin
        shared = ("plan", "order", "graph", "_traced", "_visits", "_hosts", "_statistics", "_rivals", "active")
        for name, value in self.__dict__.items():
            twin.__dict__[name] = value if name in shared else {} if name == "_programs" else copy.deepcopy(value, memo)
        twin._programs = {(): Program([], [], {})}
        return twin

    def trained_in_backbone(self) -> set[str]:
        """Give the names of the backbone parameters that are in training whenever nothing is attached."""
        thawed = {id(p) for p in self._thawed}
        return {name for name, p in self.backbone.named_parameters() if id(p) in thawed}

    def original_forward(self, fqn: str) -> Forward | None:
        """Give the instance-level forward that a module of the backbone had before any delta (None: it had none)."""
        return self._originals.get(fqn)

    def activate(self, names: Iterable[str]) -> None:
        """Make exactly these deltas act. `names` are known and may come in any order."""
        wanted = tuple(sorted(set(names), key=self.order.__getitem__))
        if wanted == self.active:
            return
        self._refuse_rivals(wanted)
        new, old = self.program(wanted), self.program(self.active)
        if not self.active:
            self._freeze()
        for attributes, original in old.undo:
            if original is None:
                del attributes["forward"]
            else:
                attributes["forward"] = original
        for attributes, forward in new.writes:
            attributes["forward"] = forward
        self.active = wanted
        if not wanted:
            self._thaw()

    def _refuse_rivals(self, wanted: tuple[str, ...]) -> None:
        """Refuse two deltas at once that both put copies in place of the same parameter."""
        if not self._rivals:
            return
        chosen = set(wanted)
        findings = [
            Diagnostic("DS436", f"deltas {a!r} and {b!r} both replace {fqn}", suggestion=f"attach one of them: c.only({a!r})")
            for (a, b), fqn in self._rivals.items()
            if a in chosen and b in chosen
        ]
        if findings:
            raise DeltaSpecError(findings)

    def rebind(self) -> None:
        """Bind tensors anew after they were moved, cast or replaced."""
        active = self.active
        for attributes, original in self.program(active).undo:
            if original is None:
                del attributes["forward"]
            else:
                attributes["forward"] = original
        self._programs = {(): Program([], [], {})}
        for attributes, forward in self.program(active).writes:
            attributes["forward"] = forward

    def check_reached(self, seen: dict[str, Observation]) -> None:
        """Refuse, after the first forward, attached deltas at modules whose weights were read without a call (DS437)."""
        findings = []
        for name in self.active:
            for host in self._hosts[name]:
                for visit in self._visits[host]:
                    reader = seen[host].host
                    if visit.delta == name and not visit.lowered and reader is not None:
                        message = f"delta {name!r} is bypassed: {reader or 'the model'} reads the weights of {host} without calling it"
                        hint = "pass example_inputs to compile, so that the plan can put the delta on the weight or refuse it"
                        findings.append(Diagnostic("DS437", message, suggestion=hint))
        if findings:
            raise DeltaSpecError(findings)
        self._proven = True
        self.rebind()

    def program(self, names: tuple[str, ...]) -> Program:
        """Give the program of an active set, made at its first use."""
        found = self._programs.get(names)
        if found is None:
            found = self._programs[names] = self._build(names)
        return found

    def _build(self, names: tuple[str, ...]) -> Program:
        program = Program([], [], {})
        chosen = set(names)
        hosts = dict.fromkeys(host for name in names for host in self._hosts[name])
        inline: dict[str, list[Visit]] = {}
        for host in hosts:
            visits = [visit for visit in self._visits[host] if visit.delta in chosen]
            if host in self._traced and not any(map(_needs_own_region, visits)):
                inline[host] = visits
                continue
            forward, built = self._bind(host, visits)
            program.regions[host] = built
            self._write(program, host, forward)
        if inline:
            self._bind_root(program, inline)
        if names and not self._proven:
            written = {id(attributes): forward for attributes, forward in program.writes}
            attributes = self.backbone.__dict__
            base = written.get(id(attributes)) or self._originals[""] or MethodType(type(self.backbone).forward, self.backbone)
            program.writes.append((attributes, FirstForward(self, base)))
            if id(attributes) not in written:
                program.undo.append((attributes, self._originals[""]))
        for fqn in self._statistics if names else ():
            if fqn not in hosts:
                self._write(program, fqn, FrozenStatistics(self._modules[fqn]))
        return program

    def _write(self, program: Program, fqn: str, forward: Forward) -> None:
        attributes = self._modules[fqn].__dict__
        program.writes.append((attributes, forward))
        program.undo.append((attributes, self._originals[fqn]))

    def _bind_root(self, program: Program, inline: dict[str, list[Visit]]) -> None:
        """Rewrite the whole model's graph at these sites and make it the backbone's forward."""
        assert self.graph is not None
        graph = copy_graph(self.graph)
        for node in [n for n in graph.nodes if n.op == "call_module" and n.target in inline]:
            visits = inline[str(node.target)]
            links, names = [], []
            for visit in visits:
                link, _, _ = self._link(visit, self._modules[str(node.target)])
                links.append(link)
                names.append(self._site_names(visit))
            rewrite_site(graph, node, tuple(links), tuple(names), opaque=visits[0].planned.site.kind == "other")
        function, code = compile_graph(graph)
        program.regions[""] = Region(None, graph, code, function, ())
        self._write(program, "", MethodType(function, self.backbone))

    def _site_names(self, visit: Visit) -> SiteNames:
        prefix = f"{RESERVED}.{visit.delta}."
        tensors = {
            spec.name: prefix + attribute_name(storage_key(visit.planned.site.row.fqn, spec)) for spec in visit.planned.tensors
        }
        probability = getattr(visit.planned.params, "dropout", 0)
        dropout = prefix + self.deltas[visit.delta].dropout_name(probability) if probability else None
        return SiteNames(tensors, dropout)

    def _link(self, visit: Visit, module: nn.Module) -> tuple[Link, list[Tensor], list[Any]]:
        """Give one delta's link at a host: (link, its tensors, its dropout if it has any)."""
        planned, delta = visit.planned, self.deltas[visit.delta]
        names = tuple(spec.name for spec in planned.tensors)
        tensors = [delta.tensor(storage_key(planned.site.row.fqn, spec)) for spec in planned.tensors]
        link = Link(visit.method, planned.params, form_of(planned.site, names), _compute(tensors, module))
        probability = getattr(planned.params, "dropout", 0)
        return link, tensors, [delta.dropout(probability)] if probability else []

    def _bind(self, host: str, visits: list[Visit]) -> tuple[Forward, Region]:
        """Build the forward of one host under the given deltas: its region's function, bound to base and tensors."""
        module = self._modules[host]
        folds, leading = [], []
        links: list[Link] = []
        bound: list[Any] = []
        for visit in visits:
            link, tensors, dropout = self._link(visit, module)
            if visit.lowered:
                path = visit.planned.site.row.fqn.removeprefix(host).removeprefix(".")
                segments = tuple(path.split(".")) if path else ()
                folds.append(Fold(segments, methods()[visit.method], link.params, visit.planned.site, link.form.tensors))
                leading += tensors
            else:
                links.append(link)
                bound += [*tensors, *dropout]
        argument, hidden = call_form(type(module), module_kind=visits[0].planned.site.kind)
        built = region(RegionKey(tuple(links), argument, hidden, len(leading)))
        frozen = host in self._statistics and not _owns_statistics(visits)
        if folds:
            base: Any = Lowered(module, tuple(folds), frozen)
        elif frozen:
            base = FrozenStatistics(module)
        else:
            base = self._originals[host] or MethodType(type(module).forward, module)
        if "swapped" in built.bound:
            bound.append(Swapped(module))
        return functools.partial(built.function, base, *leading, *bound), built

    def _freeze(self) -> None:
        """Take the backbone's own parameters out of training; remember which were in."""
        self._state.watch()
        self._thawed = [p for p in self._backbone_parameters if p.requires_grad]
        for parameter in self._thawed:
            parameter.requires_grad = False

    def _thaw(self) -> None:
        for parameter in self._thawed:
            parameter.requires_grad = True
        self._thawed = []
        self._state.restore()


class FrozenStatistics:
    """A BatchNorm's own forward, in evaluation mode whatever the model's mode is.

    The running statistics belong to the backbone. If training one delta moved them, every other delta's output, and the
    detached backbone's, would move too.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        shadow = stand_in(self.module, {})
        shadow.training = False
        return shadow.forward(*args, **kwargs)


class FirstForward:
    """Watches the first forward of a model whose sites no example inputs could prove, then takes itself out."""

    def __init__(self, attachments: Attachments, base: Forward) -> None:
        self._attachments, self._base = attachments, base

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            return self._base(*args, **kwargs)
        recorder = Recorder(self._attachments.backbone)
        with recorder.recording():
            output = self._base(*args, **kwargs)
        self._attachments.check_reached(recorder.result())
        return output


class BufferGuard:
    """Puts back buffers that a forward wrote while deltas were attached (spectral norm, moving averages)."""

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        self._modules = list(modules)
        self._kept: list[tuple[dict[str, Any], str, Tensor, Tensor, int]] = []

    def watch(self) -> None:
        """Remember all buffers; copies are made anew only of those written since the last time."""
        known = {(id(home), name): entry for entry in self._kept for home, name in [entry[:2]]}
        kept = []
        for module in self._modules:
            for name, buffer in module._buffers.items():
                if buffer is None:
                    continue
                entry = known.get((id(module._buffers), name))
                if entry is None or entry[2] is not buffer or entry[4] != _version(buffer):
                    entry = (module._buffers, name, buffer, buffer.detach().clone(), _version(buffer))
                kept.append(entry)
        self._kept = kept

    def restore(self) -> None:
        """Make every buffer what it was, object and bits."""
        for index, (home, name, buffer, copy, version) in enumerate(self._kept):
            home[name] = buffer
            if _version(buffer) != version:
                with torch.no_grad():
                    buffer.copy_(copy)
                self._kept[index] = (home, name, buffer, copy, _version(buffer))


def _version(tensor: Tensor) -> int:
    # Tensors made under inference_mode keep no count of writes.
    return -1 if tensor.is_inference() else tensor._version


def form_of(site: Site, tensors: tuple[str, ...]) -> Form:
    """Reduce a site to what a formula may depend on."""
    dims = len(site.row.shape_of("weight")) if site.row.has_parameter("weight") else 0
    return Form(site.kind, dims, dims - 2 if site.kind == "conv" else 0, site.row.conv_groups, tensors)


def call_form(kind: type[nn.Module], module_kind: str) -> tuple[str | None, str]:
    """Tell how a host is called: (its only argument's name, or None where anything is passed through; the name of the first)."""
    names = _arguments(kind)
    first = names[0] if names and not names[0].startswith("*") else "hidden_states"
    return (first if module_kind != "other" and len(names) == 1 and not names[0].startswith("*") else None), first


@functools.cache
def _arguments(kind: type[nn.Module]) -> tuple[str, ...]:
    parameters = list(inspect.signature(kind.forward).parameters.values())[1:]
    stars = {inspect.Parameter.VAR_POSITIONAL: "*", inspect.Parameter.VAR_KEYWORD: "**"}
    return tuple(stars.get(p.kind, "") + p.name for p in parameters)


def _compute(tensors: list[Tensor], module: nn.Module) -> str | None:
    """Give the delta's dtype where it is not the host's own; the formula then computes in it."""
    own = next((p.dtype for p in module.parameters() if p.is_floating_point()), None)
    delta = next((t.dtype for t in tensors if t.is_floating_point()), None)
    return None if own is None or delta is None or own == delta else str(delta).removeprefix("torch.")


def _rivals(plan: Plan) -> dict[tuple[str, str], str]:
    """Find pairs of deltas that replace the same parameter: (earlier, later) -> one such parameter."""
    holders: dict[str, list[str]] = {}
    for delta in plan.deltas:
        if methods()[delta.method].promises.weight == "replace":
            for site in delta.sites:
                for spec in site.tensors:
                    holders.setdefault(f"{site.site.row.fqn}.{spec.name}", []).append(delta.name)
    return {pair: fqn for fqn, names in holders.items() for pair in itertools.combinations(dict.fromkeys(names), 2)}


def _needs_own_region(visit: Visit) -> bool:
    return visit.lowered or methods()[visit.method].substitutes(visit.planned.site, visit.planned.params)


def _tracks_statistics(module: nn.Module) -> bool:
    return isinstance(module, nn.modules.batchnorm._NormBase) and module.running_mean is not None


def _owns_statistics(visits: list[Visit]) -> bool:
    return any(spec.buffer for visit in visits for spec in visit.planned.tensors)
