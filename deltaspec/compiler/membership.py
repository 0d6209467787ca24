"""Deltas that come to a compiled model, and deltas that leave it for good; all its views have the same."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from os import PathLike
from typing import Any

import torch
from torch import fx, nn

from deltaspec.backbone.observations import Observations
from deltaspec.backbone.tabulate import tabulate
from deltaspec.compiler.build import Built, places
from deltaspec.compiler.estimate import checked_memory
from deltaspec.deltas.initial import build_delta
from deltaspec.deltas.modules import Delta, beside
from deltaspec.diagnostics.findings import DeltaSpecError, Diagnostic
from deltaspec.graphs.symbolic import reads_around_calls, trace
from deltaspec.language.model import DeltaSpec
from deltaspec.planning.joint import extended, reduced
from deltaspec.planning.plan import Plan
from deltaspec.runtime.copies import without_deltas
from deltaspec.runtime.ports import View
from deltaspec.runtime.shared import Shared


@torch.inference_mode(False)  # parameters made in inference mode could never be trained, nor loaded outside of it
def add(built: Built, spec: str | PathLike[str] | Mapping[str, Any] | DeltaSpec, example_inputs: Any) -> None:
    """Add the deltas of a spec. Raises DeltaSpecError with all findings; then everything is as it was."""
    active, shared, host, libraries, _ = built
    with _alone(shared):
        active.follow_others()
        plain = without_deltas(host)
        before, attached, strengths, graph_before = shared.plan, active.active, active.strengths.as_dict(), active.graph
        known = {delta.name for delta in before.deltas}
        plan = extended(before, spec, tabulate(plain), Observations(plain, example_inputs))
        plan = checked_memory(plain, plan, example_inputs, before)
        new = [delta for delta in plan.deltas if delta.name not in known]
        if taken := [delta for delta in new if delta.name in libraries]:
            raise DeltaSpecError([_taken(plan, delta.name) for delta in taken])
        graph, captured, plan = _traced(plain, plan, graph_before, shared.captured)
        made = [build_delta(delta, delta.seed, host.backbone) for delta in new]
        try:
            _register(shared, made)
            shared.extend(plan, proven=plan.proven)
            for view in shared.views():
                view.changed((), graph)
            active.activate((*attached, *(delta.name for delta in new if delta.attached)), strengths=strengths)
            active.derived.refresh(delta.name for delta in new if not delta.attached)
        except BaseException:
            active.activate(attached, strengths=strengths)
            _let_go(shared, before, [delta.name for delta in new], graph_before)
            raise
        shared.captured = captured


def remove(built: Built, names: Collection[str]) -> None:
    """Take deltas out for good. Raises DeltaSpecError; then everything is as it was."""
    shared, libraries = built.shared, built.libraries
    with _alone(shared):
        findings = []
        for name in dict.fromkeys(names):
            if name in libraries:
                message = f"the delta {name!r} is in a library"
                hint = "let go of its memory with library.drop(name), or of all with library.close()"
                findings.append(Diagnostic("DS488", message, file="<model>", suggestion=hint))
        for delta in shared.plan.deltas:
            used = [name for name, _ in delta.derived.sources if name in names] if delta.derived else []
            if used and delta.name not in names:
                message = f"{delta.name!r} is derived from {', '.join(map(repr, used))}"
                hint = f"remove it too: c.remove({', '.join(map(repr, (*used, delta.name)))})"
                findings.append(Diagnostic("DS486", message, file="<model>", suggestion=hint))
        if findings:
            raise DeltaSpecError(findings)
        plan = reduced(shared.plan, names)
        left: list[tuple[View, tuple[str, ...], dict[str, float]]] = []
        try:
            for view in shared.views():
                left.append((view, view.active, view.strengths.as_dict()))
                view.leave(names)
        except BaseException:
            for view, attached, strengths in left:
                view.activate(attached, strengths=strengths)
            raise
        _let_go(shared, plan, names, built.active.graph)


@contextmanager
def _alone(shared: Shared) -> Iterator[None]:
    """Let no forward run in any view inside, and no view be made. Raises DeltaSpecError (DS456) where one runs."""
    while True:
        views = sorted(shared.views(), key=id)  # one order for all threads
        with ExitStack() as stack:
            for view in views:
                stack.enter_context(view.gate.switching())
            stack.enter_context(shared.lock)
            if {*map(id, shared.views())} <= {*map(id, views)}:
                yield
                return


def _register(shared: Shared, made: Collection[Delta]) -> None:
    """Let all views have these deltas: one as they are, the others as modules of their own with the same tensors."""
    for number, deltas in enumerate(shared.containers()):
        for delta in made:
            deltas.add(beside(delta, deltas.training) if number else delta.train(deltas.training))
    shared.moved(deltas)


def _let_go(shared: Shared, plan: Plan, names: Collection[str], graph: fx.Graph | None) -> None:
    """Forget deltas that are attached nowhere and not in this plan."""
    shared.reduce(plan)
    for deltas in shared.containers():
        for name in names:
            deltas.discard(name)
    shared.moved(deltas)
    for view in shared.views():
        view.changed(names, graph)


def _traced(
    plain: nn.Module, plan: Plan, before: fx.Graph | None, captured: tuple[str, str]
) -> tuple[fx.Graph | None, tuple[str, str], Plan]:
    """Trace the whole model anew, with the new sites, if it was traced: (graph, how and why, the plan)."""
    if before is None:
        return None, captured, plan
    sites, hosts = places(plan)
    graph, why = trace(plain, sites, hosts)
    if graph is None:
        if captured[1].startswith("asked for"):
            message = f"{plan.model_class} cannot be captured as symbolic with these sites, too: {why}"
            hint = 'compile it with capture="modules" (or "auto"), which runs the model\'s own code'
            raise DeltaSpecError([Diagnostic("DS432", message, suggestion=hint)])
        return None, ("modules", why), plan
    if not reads_around_calls(graph, plain, sites):
        plan = replace(plan, proven=True)  # the trace calls every site
    return graph, captured, plan


def _taken(plan: Plan, name: str) -> Diagnostic:
    spec = next(spec for spec in plan.specs if any(entry.name == name for entry in spec.deltas))
    index = next(number for number, entry in enumerate(spec.deltas) if entry.name == name)
    message = f"the delta name {name!r} is taken by a library"
    return spec.diagnostic("DS407", message, ("deltas", index, "name"), "rename the delta, or close the library first")
