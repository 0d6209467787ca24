"""Programs: the forwards that make one set of deltas act on a backbone clone.

A program is made once per active set and kept, so that a switch only writes one dictionary entry per module touched.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import replace
from types import MethodType
from typing import TYPE_CHECKING, Any

import torch

from deltaspec.backbone.forwards import arguments_of, gives_new_tensor, own_forward
from deltaspec.backbone.frozen import FrozenStatistics, tracks_statistics
from deltaspec.backbone.reserved import home
from deltaspec.backbone.stand_in import Swapped
from deltaspec.backbone.walk import named
from deltaspec.deltas.modules import Delta, attribute_name, storage_key
from deltaspec.deltas.strengths import Strengths
from deltaspec.graphs.links import Link
from deltaspec.graphs.passes.run import run_passes
from deltaspec.graphs.regions import Region, RegionKey, region
from deltaspec.graphs.symbolic import SiteNames, compile_graph, copy_graph, rewrite_site
from deltaspec.methods.declarations import Form
from deltaspec.methods.registry import methods
from deltaspec.runtime.lowering import Attend, Fold, Lowered
from deltaspec.runtime.placements import Placements
from deltaspec.runtime.program import Program
from deltaspec.runtime.prompts import Following, Front, Prompted

if TYPE_CHECKING:
    from torch import Tensor, fx, nn

    from deltaspec.deltas.modules import Deltas
    from deltaspec.methods.declarations import Site
    from deltaspec.planning.planned import PlannedDelta
    from deltaspec.runtime.placements import Placement
    from deltaspec.runtime.program import Forward


class ProgramBuilder:
    """Builds programs for one backbone clone."""

    def __init__(
        self, backbone: nn.Module, deltas: Deltas, planned: Mapping[str, PlannedDelta], graph: fx.Graph | None
    ) -> None:
        self._backbone, self._deltas, self._graph = backbone, deltas, graph
        self.strengths = Strengths()
        self._traced = {str(node.target) for node in graph.nodes if node.op == "call_module"} if graph else set()
        self._home = home(backbone)
        self.modules = dict(named(backbone, but=self._home))
        self.originals: dict[str, Forward | None] = {n: m.__dict__.get("forward") for n, m in self.modules.items()}
        """Instance-level forwards of other libraries' hooks, by FQN."""
        self.statistics = [fqn for fqn, module in self.modules.items() if tracks_statistics(module)]
        self.hosts = Placements(planned)
        """Where each delta works: its placements by the FQN of the host."""

    def build(
        self,
        names: tuple[str, ...],
        wrap_root: Callable[[Forward], Forward] | None = None,
        scaled: Collection[str] = (),
    ) -> Program:
        """Build the program of a set of deltas, given in order.

        `wrap_root` goes around the whole model's forward; those in `scaled` act by their strengths.
        """
        program = Program()
        if not names:
            return program
        hosts = dict.fromkeys(host for name in names for host in self.hosts[name])
        inline: dict[str, list[Placement]] = {}
        for host in hosts:
            placements = self._at(host, names)
            if host in self._traced and not any(_needs_own_region(v) or v.delta in scaled for v in placements):
                inline[host] = placements
                continue
            forward, built = self.bind(host, placements, scaled)
            program.regions[host] = built
            self._write(program, host, forward)
        if inline:
            self._bind_root(program, inline)
        for fqn in self.statistics:
            if fqn not in hosts or fqn in inline:
                self._write(program, fqn, FrozenStatistics(self.modules[fqn]))
        self._put_prompts_in_front(program, names)
        if wrap_root is not None:
            self._put_around(program, "", wrap_root(self._so_far(program, "")))
        return program

    def _at(self, host: str, names: Iterable[str]) -> list[Placement]:
        return [placement for name in names for placement in self.hosts[name].get(host, ())]

    def _so_far(self, program: Program, fqn: str) -> Forward:
        """Return the forward that a module has under a program that is being built."""
        attributes = self.modules[fqn].__dict__
        return next((f for a, f in reversed(program.writes) if a is attributes), None) or self.own_forward(fqn)

    def _put_around(self, program: Program, fqn: str, forward: Forward) -> None:
        """Let a module have a forward that calls the one it has so far."""
        attributes = self.modules[fqn].__dict__
        if all(a is not attributes for a, _ in program.undo):
            program.undo.append((attributes, self.originals[fqn]))
        program.writes.append((attributes, forward))

    def _put_prompts_in_front(self, program: Program, names: tuple[str, ...]) -> None:
        """Put virtual tokens in front of the inputs whose embeddings have some."""
        names = tuple(name for name in names if any(_virtual_tokens(v) for vs in self.hosts[name].values() for v in vs))
        for host in dict.fromkeys(host for name in names for host in self.hosts[name]):
            entering = [(v, v.planned.site.row.entrance) for v in self._at(host, names) if _virtual_tokens(v)]
            front = Front([_virtual_tokens(placement) for placement, _ in entering])
            entrance = next((entrance for _, entrance in entering if entrance is not None), None)
            if entrance is None:
                continue
            fqn, follower = entrance.fqn, entrance.follower
            around, embedding = self._so_far(program, fqn), self.modules[host]
            prompted = Prompted(self.modules[fqn], around, embedding, front, shorten=follower is None)
            self._put_around(program, fqn, prompted)
            if follower is not None:
                around = self._so_far(program, follower)
                self._put_around(program, follower, Following(self.modules[follower], around, front))

    def placements_of(self, delta: str) -> list[Placement]:
        """Return all placements of one delta."""
        return [placement for placements in self.hosts[delta].values() for placement in placements]

    def discard(self, delta: str) -> None:
        """Forget a delta."""
        self.hosts.pop(delta, None)

    def own_forward(self, fqn: str) -> Forward:
        """Return the forward that a module has without any delta."""
        module = self.modules[fqn]
        return self.originals[fqn] or own_forward(module)

    def _write(self, program: Program, fqn: str, forward: Forward) -> None:
        attributes = self.modules[fqn].__dict__
        program.writes.append((attributes, forward))
        program.undo.append((attributes, self.originals[fqn]))

    def bind(
        self, host: str, placements: list[Placement], scaled: Collection[str], strengths: Strengths | None = None
    ) -> tuple[Forward, Region]:
        """Build the forward of one host under the given deltas: its region's function, bound to base and tensors.

        Those in `scaled` act by their strengths, by default those of the attached deltas.
        """
        module = self.modules[host]
        folds: list[Fold] = []
        attends: list[Attend] = []
        links: list[Link] = []
        leading: list[Any] = []
        inside: list[Any] = []
        bound: list[Any] = []
        for placement in _virtual_outermost(placements):
            link, tensors, dropout = self.link(placement, module)
            is_scaled = placement.delta in scaled
            strength = [(strengths or self.strengths).tensor(placement.delta, tensors[0])] if is_scaled else []
            if placement.lowered:
                path = placement.planned.site.row.fqn.removeprefix(host).removeprefix(".")
                segments = tuple(path.split(".")) if path else ()
                method = methods()[placement.method]
                folds.append(Fold(segments, method, link.params, placement.planned.site, link.form.tensors, is_scaled))
                leading += [*tensors, *strength]
            elif methods()[placement.method].attends:
                attends.append(Attend(methods()[placement.method], link.params, link.form, is_scaled))
                inside += [*tensors, *strength]
            else:
                links.append(replace(link, scaled=is_scaled))
                bound += [*tensors, *dropout, *strength]
        leading += inside
        built = self.region_of(host, placements, tuple(links), len(leading))
        frozen = host in self.statistics and not _owns_statistics(placements)
        if folds or attends:
            base: Any = Lowered(module, tuple(folds), frozen, tuple(attends))
        else:
            base = FrozenStatistics(module) if frozen else self.own_forward(host)
        if "swapped" in built.bound:
            bound.append(Swapped(module))
        return functools.partial(built.function, base, *leading, *bound), built

    def region_of(self, host: str, placements: list[Placement], links: tuple[Link, ...], lowered: int = 0) -> Region:
        """Return the region of a host: what is called, and the links around it."""
        kind = type(self.modules[host])
        argument, hidden = call_form(kind, placements[0].planned.site)
        named = _arguments(kind.forward) if any(_arguments_asked(placement) for placement in placements) else ()
        owned = self.originals[host] is None and gives_new_tensor(kind)
        return region(RegionKey(links, argument, hidden, lowered, named, owned))

    def _bind_root(self, program: Program, inline: dict[str, list[Placement]]) -> None:
        """Rewrite the whole model's graph at these sites and make it the backbone's forward."""
        assert self._graph is not None
        graph = copy_graph(self._graph)
        for node in [n for n in graph.nodes if n.op == "call_module" and n.target in inline]:
            placements = inline[str(node.target)]
            module = self.modules[str(node.target)]
            links = tuple(self.link(placement, module)[0] for placement in placements)
            names = tuple(self._names(placement) for placement in placements)
            site = placements[0].planned.site
            _, hidden = call_form(type(module), site)
            rewrite_site(graph, node, links, names, site.kind == "other" or not site.row.faithful, hidden)
        run_passes(graph, home=self._home, modules=self.modules)
        function, code = compile_graph(graph)
        program.regions[""] = Region(None, graph, code, function, ())
        self._write(program, "", MethodType(function, self._backbone))

    def link(self, placement: Placement, module: nn.Module) -> tuple[Link, list[Tensor], list[nn.Dropout]]:
        """Return one delta's link at a host: (link, its tensors, its dropout if it has any)."""
        planned, delta = placement.planned, self._deltas[placement.delta]
        names = tuple(spec.name for spec in planned.tensors)
        tensors = [delta.tensor(storage_key(planned.site.row.fqn, spec)) for spec in planned.tensors]
        link = Link(placement.method, planned.params, form_of(planned.site, names), *_compute(tensors, module))
        probability = getattr(planned.params, "dropout", 0)
        return link, tensors, [delta.dropout(probability)] if probability else []

    def _names(self, placement: Placement) -> SiteNames:
        """Return where one delta's tensors at a site are registered."""
        planned, prefix = placement.planned, f"{self._home}.{placement.delta}."
        tensors = {s.name: prefix + attribute_name(storage_key(planned.site.row.fqn, s)) for s in planned.tensors}
        probability = getattr(planned.params, "dropout", 0)
        return SiteNames(tensors, prefix + Delta.dropout_name(probability) if probability else None)


def form_of(site: Site, tensors: tuple[str, ...]) -> Form:
    """Reduce a site to what a formula may depend on."""
    dims = len(site.row.shape_of("weight")) if site.row.has_parameter("weight") else 0
    return Form(site.kind, dims, dims - 2 if site.kind == "conv" else 0, site.row.conv_groups, tensors, site.row.parts)


def call_form(kind: type[nn.Module], site: Site) -> tuple[str | None, str]:
    """Return how a host is called: (its only argument's name, or None where anything is passed through; the first's
    name).
    """
    names = _arguments(kind.forward)
    first = names[0] if names and not names[0].startswith("*") else "hidden_states"
    known = site.kind != "other" and site.row.faithful
    single = known and len(names) == 1 and not names[0].startswith("*")
    return (first if single else None), first


@functools.cache
def _arguments(forward: Callable[..., Any]) -> tuple[str, ...]:
    parameters = arguments_of(forward)
    stars = {"VAR_POSITIONAL": "*", "VAR_KEYWORD": "**"}
    return tuple(stars.get(p.kind.name, "") + p.name for p in parameters)


def _compute(tensors: list[Tensor], module: nn.Module) -> tuple[str | None, bool]:
    """Return the wider of the delta's dtype and the host's where they differ, and whether the delta's is another.

    The formula computes in it: what the host gives goes through it, and must come back as it was without the delta.
    """
    own = next((p.dtype for p in module.parameters() if p.is_floating_point()), None)
    delta = next((t.dtype for t in tensors if t.is_floating_point()), None)
    if own is None or delta is None or own == delta:
        return None, False
    wide = torch.promote_types(own, delta)
    return str(wide).removeprefix("torch."), wide != delta


def _owns_statistics(placements: list[Placement]) -> bool:
    return any(spec.buffer for placement in placements for spec in placement.planned.tensors)


def _needs_own_region(placement: Placement) -> bool:
    substitutes = methods()[placement.method].substitutes(placement.planned.site, placement.planned.params)
    return placement.lowered or substitutes or bool(_arguments_asked(placement))


def _arguments_asked(placement: Placement) -> tuple[str, ...]:
    return methods()[placement.method].arguments(placement.planned.site, placement.planned.params)


def _virtual_tokens(placement: Placement) -> int:
    return methods()[placement.method].virtual_tokens(placement.planned.params)


def _virtual_outermost(placements: list[Placement]) -> list[Placement]:
    """Put deltas that know virtual tokens around those that do not, at one embedding."""
    return sorted(placements, key=lambda placement: _virtual_tokens(placement) > 0)
