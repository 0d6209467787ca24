"""`deltaspec.compile`: from a model and specs to a compiled model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from os import PathLike
from typing import Any, TypeAlias

from torch import nn

from deltaspec.backbone.sharded import refuse_sharded
from deltaspec.compiler.build import build
from deltaspec.compiler.compiled import CompiledModel
from deltaspec.compiler.estimate import checked_memory
from deltaspec.language.model import DeltaSpec
from deltaspec.language.passes import chosen
from deltaspec.planning.plan import Plan
from deltaspec.planning.resolve import plan

Spec: TypeAlias = "str | PathLike[str] | Mapping[str, Any] | DeltaSpec"


def compile(
    model: nn.Module,
    spec: Spec,
    *more_specs: Spec,
    capture: str = "auto",
    example_inputs: Any = None,
    train_backbone: bool = False,
    passes: bool | Iterable[str] = True,
) -> CompiledModel:
    """Compile one or several specs onto a model; the model is not changed.

    A spec is a path, a dict or a DeltaSpec; the names of the deltas of several specs must differ. The result shares the
    storage of the model's weights. `capture`: `modules` runs the model's own code, with one small graph per site;
    `symbolic` traces the whole model into one graph; `auto` takes `symbolic` where that is safe (see `.capture`,
    `.capture_reason`). `example_inputs` are inputs of the model's forward (keywords in a dict, positional arguments in
    a tuple, or one tensor), for one forward on meta tensors that proves that each site is reached; transformers models
    need none.

    While nothing is attached, the backbone's parameters require gradients as the model's do, and a backward that
    reaches them raises DeltaSpecError (DS416): it would train your model. `train_backbone=True` lets them be trained
    then: the result has weights of its own from the start (which take their memory again), and the model's stay.

    `passes` make training steps lighter, with the same gradients within round-off: `recompute`, `rematerialise`,
    `dropout` and `feed_forward`, all by default; the names of some, or False for none. What a spec leaves out stays
    out. Raises DeltaSpecError (DS480) for unknown names.

    Raises DeltaSpecError with all findings, before anything is made.
    """
    refuse_unusable(model, capture)
    wanted = chosen(passes)
    planned = plan(model, spec, *more_specs, example_inputs=example_inputs)
    planned = planned if wanted == planned.passes else replace(planned, passes=wanted)
    planned = checked_memory(model, planned, example_inputs)
    return CompiledModel(*build(model, planned, capture, trained=train_backbone))


def compile_plan(model: nn.Module, plan: Plan, capture: str = "auto", *, drawn: bool = True) -> CompiledModel:
    """Compile a valid plan onto a clone of the model it was made for; `drawn` as for `build_delta`."""
    return CompiledModel(*build(model, plan, capture, drawn=drawn))


def refuse_unusable(model: nn.Module, capture: str) -> None:
    """Refuse a capture that there is not, what is no model, and a model in shards."""
    if capture not in ("auto", "modules", "symbolic"):
        raise ValueError(f"capture is 'auto', 'modules' or 'symbolic', not {capture!r}")
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, not {type(model).__name__}")
    refuse_sharded(model)
