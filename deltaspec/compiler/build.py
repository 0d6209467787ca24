"""Building: from a model and a valid plan to the parts of a compiled model."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import torch
from torch import fx, nn

from deltaspec.backbone.clone import clone
from deltaspec.backbone.reserved import place
from deltaspec.deltas.initial import build_delta
from deltaspec.deltas.modules import Deltas
from deltaspec.diagnostics.findings import DeltaSpecError, Diagnostic
from deltaspec.graphs.fixed import fixed_in
from deltaspec.graphs.symbolic import reads_around_calls, trace
from deltaspec.library.libraries import Libraries
from deltaspec.planning.plan import Plan
from deltaspec.runtime.active import Active
from deltaspec.runtime.host import Host
from deltaspec.runtime.shared import Shared
from deltaspec.serving.mixer import Mixer


class Built(NamedTuple):
    """The parts of a compiled model: see their classes."""

    active: Active
    shared: Shared
    host: Host
    libraries: Libraries
    rows: Mixer


def assemble(
    backbone: nn.Module, deltas: Deltas, plan: Plan, graph: fx.Graph | None, *, trained: bool = False
) -> Built:
    """Make the parts of a compiled model of a backbone that holds its deltas already; nothing is attached yet.

    `trained`: the backbone itself may be trained, too.
    """
    shared, host = Shared(deltas, plan), Host(backbone, deltas, trained=trained)
    libraries = Libraries(shared)
    return with_rows(Active(shared, host, libraries, graph), shared, libraries)


def with_rows(active: Active, shared: Shared, libraries: Libraries) -> Built:
    """Put what runs rows into a view, and return its parts."""
    active.rows = rows = Mixer(active, shared, active.host)
    return Built(active, shared, active.host, libraries, rows)


def places(plan: Plan) -> tuple[set[str], set[str]]:
    """Return the FQNs of all sites, and of the modules whose forwards their deltas need."""
    sites = [site.site for delta in plan.deltas for site in delta.sites]
    streams = {site.stream for site in sites if site.stream is not None}
    hosts = {s.row.fqn if s.host is None else s.host for s in sites}
    return {s.row.fqn for s in sites} | streams, hosts | streams


@torch.inference_mode(False)  # parameters made in inference mode could never be trained, nor loaded outside of it
def build(
    model: nn.Module, plan: Plan, capture: str = "auto", *, drawn: bool = True, trained: bool = False
) -> tuple[Built, str, str]:
    """Compile a valid plan onto a clone of the model it was made for; `drawn` as for `build_delta`.

    `trained`: the clone has weights of its own, which may be trained.
    Return the parts, how the model was captured, and why so.
    """
    backbone = clone(model, own=trained)
    graph, reason = None, "asked for"
    if capture != "modules":
        graph, why = trace(backbone, *places(plan), fixes=capture == "symbolic")
        if graph is None and capture == "symbolic":
            message = f"{type(model).__name__} cannot be captured as symbolic: {why}"
            hint = 'use capture="modules" (or "auto"), which runs the model\'s own code'
            raise DeltaSpecError([Diagnostic("DS432", message, suggestion=hint)])
        if capture == "auto":
            capture, reason = ("modules" if graph is None else "symbolic"), why
        elif fixed := fixed_in(graph):
            reason = f"asked for; the trace fixes {', '.join(fixed)}"
        reads = any(site.site.stream is not None for delta in plan.deltas for site in delta.sites)
        if graph is not None and not reads and not reads_around_calls(graph, backbone, places(plan)[0]):
            plan = replace(plan, proven=True)  # the trace calls every site; in which order and on what, a forward shows
    deltas = Deltas()
    for planned in plan.deltas:
        deltas.add(build_delta(planned, planned.seed, backbone, drawn=drawn))
    deltas.train(model.training)
    place(backbone, deltas)
    built = assemble(backbone, deltas, plan, graph, trained=trained)
    built.active.activate(planned.name for planned in plan.deltas if planned.attached)
    built.active.derived.refresh_others(built.active.active)
    return built, capture, reason
