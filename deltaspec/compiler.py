"""`deltaspec.compile`: from a model and specs to a compiled model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from os import PathLike
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import nn

from deltaspec.clone import clone
from deltaspec.compiled import CompiledModel, assemble, places
from deltaspec.deltas import Deltas, place
from deltaspec.diagnostics import DeltaSpecError, Diagnostic
from deltaspec.initial import build_delta
from deltaspec.symbolic import reads_around_calls, trace

if TYPE_CHECKING:
    from deltaspec.planning.planned import Plan
    from deltaspec.spec import DeltaSpec

Spec: TypeAlias = "str | PathLike[str] | Mapping[str, Any] | DeltaSpec"


def compile(
    model: nn.Module, spec: Spec, *more_specs: Spec, capture: str = "auto", example_inputs: Any = None
) -> CompiledModel:
    """Compile one or several specs onto a model; the model is not changed.

    A spec is a path, a dict or a DeltaSpec; the names of the deltas of several specs must differ. The result shares the
    storage of the model's weights. `capture`: `modules` runs the model's own code, with one small graph per site;
    `symbolic` traces the whole model into one graph; `auto` takes `symbolic` where that is safe (see `.capture`,
    `.capture_reason`). `example_inputs` are inputs of the model's forward (keywords in a dict, positional arguments in
    a tuple, or one tensor), for one forward on meta tensors that proves that each site is reached; transformers models
    need none.

    Raises DeltaSpecError with all findings, before anything is made.
    """
    from deltaspec.plan import plan

    refuse_unusable(model, capture)
    return compile_plan(model, plan(model, spec, *more_specs, example_inputs=example_inputs), capture)


@torch.inference_mode(False)  # parameters made in inference mode could never be trained, nor loaded outside of it
def compile_plan(model: nn.Module, plan: Plan, capture: str = "auto", *, drawn: bool = True) -> CompiledModel:
    """Compile a valid plan onto a clone of the model it was made for; `drawn` as for `build_delta`."""
    backbone = clone(model)
    graph, reason = None, "asked for"
    if capture != "modules":
        graph, why = trace(backbone, *places(plan))
        if graph is None and capture == "symbolic":
            message = f"{type(model).__name__} cannot be captured as symbolic: {why}"
            hint = 'use capture="modules" (or "auto"), which runs the model\'s own code'
            raise DeltaSpecError([Diagnostic("DS432", message, suggestion=hint)])
        if capture == "auto":
            capture, reason = ("modules" if graph is None else "symbolic"), why
        if graph is not None and not reads_around_calls(graph, backbone, places(plan)[0]):
            plan = replace(plan, proven=True)  # the trace calls every site
    deltas = Deltas()
    for planned in plan.deltas:
        deltas.add(build_delta(planned, planned.seed, backbone, drawn=drawn))
    deltas.train(model.training)
    place(backbone, deltas)
    compiled = assemble(backbone, deltas, plan, graph, capture, reason)
    compiled._attachments.activate(planned.name for planned in plan.deltas if planned.attached)
    compiled._attachments.derive_detached()
    return compiled


def refuse_unusable(model: nn.Module, capture: str) -> None:
    """Refuse a capture that there is not, and what is no model."""
    if capture not in ("auto", "modules", "symbolic"):
        raise ValueError(f"capture is 'auto', 'modules' or 'symbolic', not {capture!r}")
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, not {type(model).__name__}")
