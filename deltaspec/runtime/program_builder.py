"""Programs: the forwards that make one set of deltas act on a backbone clone.

A program is made once per active set and kept, so that a switch only fills one socket per module touched. What it
binds are modules and names: tensors are looked up when a forward runs, so that others may replace them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from types import MethodType
from typing import Any, TypeAlias

from torch import Tensor, fx, nn

from deltaspec.backbone.forwards import gives_new_tensor
from deltaspec.backbone.stand_in import Swapped
from deltaspec.backbone.weight_forms import is_packed
from deltaspec.deltas.modules import Delta, attribute_name, storage_key
from deltaspec.deltas.strengths import Strengths
from deltaspec.graphs.links import Link
from deltaspec.graphs.passes.recompute import HOST
from deltaspec.graphs.passes.run import run_passes
from deltaspec.graphs.regions import Region, RegionKey, region
from deltaspec.graphs.symbolic import SiteNames, compile_graph, copy_graph, rewrite_site
from deltaspec.methods.registry import methods
from deltaspec.names.escaping import escaped
from deltaspec.runtime.beside import Beside
from deltaspec.runtime.counting import Counted
from deltaspec.runtime.forms import argument_names, call_form, computed_in, form_of
from deltaspec.runtime.host import Host
from deltaspec.runtime.lowering import Attend, Fold, Lowered
from deltaspec.runtime.misfits import refuse_misfits
from deltaspec.runtime.placements import Placement, Placements
from deltaspec.runtime.program import Program
from deltaspec.runtime.prompts import Following, Front, Prompted
from deltaspec.runtime.sockets import Forward
from deltaspec.runtime.streams import Reading, Streams, tap
from deltaspec.runtime.trained import activations, dropouts, trained_by

_LONGEST = 64
"""Links of one region at most: emitting a chain takes some frames a link. More are regions around regions."""

Given: TypeAlias = "Callable[[Placement, list[Tensor]], tuple[list[Any], list[Any]]]"
"""From a placement and its tensors to what its region gets for them, and its strength, if it acts by one."""


@dataclass(slots=True)
class SortedOut:
    """The deltas at one host by how they work there, in order, with what their formulas are given."""

    folds: list[tuple[Placement, Fold, list[Any]]] = field(default_factory=list)
    """Deltas that work through parameters."""
    attends: list[tuple[Placement, Attend, list[Any]]] = field(default_factory=list)
    """Deltas that work inside the attention function."""
    links: list[Link] = field(default_factory=list)
    """Deltas that work around the host's call."""
    arguments: list[list[Any]] = field(default_factory=list)
    """Arguments of each link."""


class ProgramBuilder:
    """Builds programs for one backbone clone."""

    def __init__(
        self, host: Host, placements: Placements, graph: fx.Graph | None, strengths: Strengths | None = None
    ) -> None:
        self.host, self.placements = host, placements
        self.deltas, self.own_forward, self.streams = host.deltas, host.own_forward, Streams()
        self.strengths = Strengths() if strengths is None else strengths
        self.take(graph)

    def take(self, graph: fx.Graph | None) -> None:
        """Let this be the trace of the whole model, from now on; None where it is not traced."""
        self.graph = graph
        self.traced = {str(node.target) for node in graph.nodes if node.op == "call_module"} if graph else set()

    @property
    def modules(self) -> dict[str, nn.Module]:
        """All modules of the backbone but the deltas, by FQN."""
        return self.host.modules

    @property
    def statistics(self) -> list[str]:
        """FQNs of the modules that write running statistics."""
        return self.host.statistics

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
        refuse_misfits(self.host, (self.placements.planned[name] for name in names))
        every = dict.fromkeys(host for name in names for host in self.placements[name])
        hosts = {host: self._at(host, names) for host in every}
        inline: dict[str, list[Placement]] = {}
        tapped = self.streams.at(hosts)
        for host, placements in hosts.items():
            alone = len(placements) > _LONGEST or any(_needs_own_region(v) or v.delta in scaled for v in placements)
            # Hooks go around the deltas, which a trace puts around them; what is read is what enters.
            alone = alone or _has_hooks(self.modules[host]) or host in tapped
            if host in self.traced and not alone:
                inline[host] = placements
                continue
            forward, built = self.bind(host, placements, scaled)
            program.regions[host] = built
            self._write(program, host, forward)
        if inline:
            self._bind_root(program, inline)
        apart = {fqn: hosts[fqn] for fqn in program.regions if fqn in hosts}
        for fqn, forward in chain(activations(apart, self.host), dropouts(apart, self.host)):
            self._write(program, fqn, forward)
        for fqn in self.statistics:
            if fqn not in hosts or fqn in inline:
                self._write(program, fqn, self.host.frozen_statistics(fqn))
        for fqn, forward in tap(tapped, self.modules, lambda fqn: self._so_far(program, fqn)).items():
            self._write(program, fqn, forward)
        self._count_positions(program, names)
        self._put_prompts_in_front(program, names)
        if wrap_root is not None:
            self._write(program, "", wrap_root(self._so_far(program, "")))
        return program

    def _at(self, host: str, names: Iterable[str]) -> list[Placement]:
        return [placement for name in names for placement in self.placements[name].get(host, ())]

    def _so_far(self, program: Program, fqn: str) -> Forward:
        """Return the forward that a module has under a program that is being built."""
        return program.forwards.get(self.host.socket(fqn)) or self.own_forward(fqn)

    def _count_positions(self, program: Program, names: tuple[str, ...]) -> None:
        """Have tokens numbered behind the positions that deltas take, each as many at all modules of a model."""
        taken: dict[str, dict[str, int]] = {}
        for name in names:
            for placement in self.placements.of(name):
                told = placement.planned.site.row.positions
                if told is not None and placement.counted_tokens:
                    for taker in told.takers:
                        taken.setdefault(taker, {})[name] = placement.counted_tokens
        for taker, tokens in taken.items():
            forward = self._so_far(program, taker)
            self._write(program, taker, Counted(self.modules[taker], forward, sum(tokens.values())))

    def _put_prompts_in_front(self, program: Program, names: tuple[str, ...]) -> None:
        """Put virtual tokens in front of the inputs whose embeddings have some."""
        names = tuple(name for name in names if any(v.virtual_tokens for v in self.placements.of(name)))
        for host in dict.fromkeys(host for name in names for host in self.placements[name]):
            entering = [(v, v.planned.site.row.entrance) for v in self._at(host, names) if v.virtual_tokens]
            front = Front([v.virtual_tokens for v, _ in entering], any(v.leads for v, _ in entering))
            entrance = next((entrance for _, entrance in entering if entrance is not None), None)
            if entrance is None:
                continue
            fqn, follower = entrance.fqn, entrance.follower
            around, embedding = self._so_far(program, fqn), self.modules[host]
            shorten = follower is None and not any(v.stays for v, _ in entering)
            prompted = Prompted(self.modules[fqn], around, embedding, front, shorten)
            self._write(program, fqn, prompted)
            if follower is not None:
                around = self._so_far(program, follower)
                self._write(program, follower, Following(self.modules[follower], around, front))

    def _write(self, program: Program, fqn: str, forward: Forward) -> None:
        program.forwards[self.host.socket(fqn)] = forward

    def bind(
        self, host: str, placements: list[Placement], scaled: Collection[str], strengths: Strengths | None = None
    ) -> tuple[Forward, Region]:
        """Build the forward of one host under the given deltas: its region's function, bound to base and tensors.

        Those in `scaled` act by their strengths, by default those of the attached deltas.
        """

        def given(placement: Placement, tensors: list[Tensor]) -> tuple[list[Any], list[Any]]:
            name, fqn = placement.delta, placement.planned.site.row.fqn
            keys = [attribute_name(storage_key(fqn, spec)) for spec in placement.planned.tensors]
            strength = [(strengths or self.strengths).tensor(name, tensors[0])] if name in scaled else []
            return [self.deltas[name], *keys] if keys else [], strength

        # At one embedding, deltas that know virtual tokens go around those that do not.
        inside_out = sorted(placements, key=lambda placement: placement.virtual_tokens > 0)
        sorted_out = self.sort_out(host, ((placement, given) for placement in inside_out))
        frozen = host in self.statistics and not any(s.buffer for p in placements for s in p.planned.tensors)
        folds, attends = sorted_out.folds, sorted_out.attends
        if folds and is_packed(self.modules[host]):
            base: Any = Beside(self.modules[host], tuple(fold for _, fold, _ in folds), self.own_forward(host))
        elif folds or attends:
            hooked = tuple(attend for _, attend, _ in attends)
            base = Lowered(self.modules[host], tuple(fold for _, fold, _ in folds), frozen, hooked)
        else:
            base = self.host.frozen_statistics(host) if frozen else self.own_forward(host)
        leading = [(p, fold.scaled, values) for p, fold, values in folds]
        leading += [(p, attend.scaled, values) for p, attend, values in attends]
        return self.bind_region(host, placements, sorted_out, base, leading)

    def sort_out(self, host: str, placements: Iterable[tuple[Placement, Given]], *, per_row: bool = False) -> SortedOut:
        """Sort the deltas at one host by how they work there; `per_row`: what they are given is each row's."""
        found, module = SortedOut(), self.modules[host]
        for placement, given in placements:
            method, site = methods()[placement.method], placement.planned.site
            link, own, dropout = self.link(placement, module)
            values, strength = given(placement, own)
            if placement.lowered:
                path = site.row.fqn.removeprefix(host).removeprefix(".")
                segments = tuple(path.split(".")) if path else ()
                fold = Fold(segments, method, link.params, site, link.form.tensors, bool(strength))
                found.folds.append((placement, fold, [*values, *strength]))
            elif method.attends:
                attend = Attend(method, link.params, link.form, bool(strength))
                found.attends.append((placement, attend, [*values, *strength]))
            else:
                found.links.append(replace(link, scaled=bool(strength) and not per_row, per_row=per_row))
                stream = self.streams.of(placement, host)
                dropping = [] if per_row else dropout  # each row's own is among the values
                found.arguments.append([*values, *dropping, *([] if stream is None else [stream]), *strength])
        return found

    def bind_region(
        self,
        host: str,
        placements: list[Placement],
        sorted_out: SortedOut,
        base: Any,
        leading: Sequence[tuple[Placement, bool, list[Any]]] = (),
    ) -> tuple[Forward, Region]:
        """Bind the function of a host's region to what it calls, arguments of that, and those of its links.

        `leading` are those arguments, by delta: (its placement, whether its strength is last, the arguments). Of a
        long chain the outermost region is returned.
        """
        module, kind = self.modules[host], type(self.modules[host])
        argument, hidden = call_form(kind, placements[0].planned.site)
        named = argument_names(kind.forward) if any(placement.arguments for placement in placements) else ()
        owned = self.host.socket(host).original is None and gives_new_tensor(kind)
        lowered = tuple(
            (*(s.buffer for s in p.planned.tensors), *([None] if scaled else [])) for p, scaled, _ in leading
        )
        inside = [value for _, _, values in leading for value in values]
        links, arguments = tuple(sorted_out.links), sorted_out.arguments
        for first in range(0, max(len(links), 1), _LONGEST):
            part = slice(first, first + _LONGEST)
            how = trained_by(placements, links[part], owned and not lowered)
            built = region(RegionKey(links[part], argument, hidden, lowered, named, owned, how))
            more = [value for name, value in ((HOST, module), ("swapped", Swapped(module))) if name in built.bound]
            base = functools.partial(built.function, base, *inside, *chain.from_iterable(arguments[part]), *more)
            inside, lowered, owned = [], (), False  # those are in the first; what a region gives may be kept in it
        read = dict.fromkeys(stream for p in placements if (stream := self.streams.of(p, host)) is not None)
        return (Reading(base, tuple(read)) if read else base), built

    def _bind_root(self, program: Program, inline: dict[str, list[Placement]]) -> None:
        """Rewrite the whole model's graph at these sites and make it the backbone's forward."""
        assert self.graph is not None
        graph = copy_graph(self.graph)
        for node in [n for n in graph.nodes if n.op == "call_module" and n.target in inline]:
            placements = inline[str(node.target)]
            module = self.modules[str(node.target)]
            links = tuple(self.link(placement, module)[0] for placement in placements)
            names = tuple(self._names(placement) for placement in placements)
            site = placements[0].planned.site
            _, hidden = call_form(type(module), site)
            rewrite_site(graph, node, links, names, site.kind == "other" or not site.row.faithful, hidden)
        run_passes(graph, home=self.host.home, modules=self.modules)
        function, code = compile_graph(graph)
        program.regions[""] = Region(None, graph, code, function, ())
        self._write(program, "", MethodType(function, self.host.backbone))

    def link(self, placement: Placement, module: nn.Module) -> tuple[Link, list[Tensor], list[nn.Dropout]]:
        """Return one delta's link at a host: (link, its tensors, its dropout if it has any)."""
        planned, delta = placement.planned, self.deltas[placement.delta]
        names = tuple(spec.name for spec in planned.tensors)
        tensors = [delta.tensor(storage_key(planned.site.row.fqn, spec)) for spec in planned.tensors]
        link = Link(placement.method, planned.params, form_of(planned.site, names), *computed_in(tensors, module))
        if buffers := frozenset(spec.name for spec in planned.tensors if spec.buffer):
            link = replace(link, buffers=buffers)
        probability = methods()[placement.method].dropout(planned.params)
        return link, tensors, [delta.dropout(probability)] if probability else []

    def _names(self, placement: Placement) -> SiteNames:
        """Return where one delta's tensors at a site are registered."""
        planned, prefix = placement.planned, f"{self.host.home}.{escaped(placement.delta)}."
        tensors = {s.name: prefix + attribute_name(storage_key(planned.site.row.fqn, s)) for s in planned.tensors}
        probability = methods()[placement.method].dropout(planned.params)
        return SiteNames(tensors, prefix + Delta.dropout_name(probability) if probability else None)


def _needs_own_region(placement: Placement) -> bool:
    substitutes = methods()[placement.method].substitutes(placement.planned.site, placement.planned.params)
    return placement.lowered or substitutes or bool(placement.arguments) or placement.planned.site.stream is not None


def _has_hooks(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks)
