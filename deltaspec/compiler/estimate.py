"""`deltaspec.plan` and `deltaspec.estimate`: what specs do to a model, and what it takes to train them."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from deltaspec.compiler.build import build
from deltaspec.compiler.handles import trainable
from deltaspec.costs.estimate import Estimate
from deltaspec.costs.estimator import Question, Report, answer
from deltaspec.costs.gate import with_memory
from deltaspec.costs.trial import Compiled
from deltaspec.diagnostics.findings import Diagnostic
from deltaspec.language.conditions import Conditions, conditions
from deltaspec.language.model import DeltaSpec
from deltaspec.planning import resolve
from deltaspec.planning.plan import Plan


def plan(
    model: nn.Module, *specs: str | os.PathLike[str] | Mapping[str, Any] | DeltaSpec, example_inputs: Any = None
) -> Plan:
    """Return what `compile` would do with these specs on this model, without doing it. Meta weights are enough.

    `example_inputs` are what the model's forward takes (a mapping of keywords, a tuple of arguments, or one tensor).
    One forward on meta tensors proves that each site is called; a transformers model brings inputs of its own. The
    model is not changed. A step of training is estimated where a spec expects something of its memory, and only there.
    Raises DeltaSpecError with all findings of all specs at once.

    >>> print(deltaspec.plan(model, "specs/french.deltaspec.yaml"))
    """
    made = resolve.plan(model, *specs, example_inputs=example_inputs)
    return checked_memory(model, made, example_inputs)


def checked_memory(model: nn.Module, plan: Plan, example_inputs: Any, before: Plan | None = None) -> Plan:
    """Return a plan with what its specs expect of memory. Raises DeltaSpecError where that is not so (DS505, DS507).

    What was checked in the plan `before` is taken from there.
    """

    def estimated(part: Plan, asked: Conditions, report: Report) -> Estimate:
        return answer(Question(model, part, asked, example_inputs, report, beside=False), _compile)

    return with_memory(plan, estimated, before)


def estimate(
    model: nn.Module,
    *specs: str | os.PathLike[str] | Mapping[str, Any] | DeltaSpec,
    example_inputs: Any = None,
    **options: Any,
) -> Estimate:
    """Estimate what a step of training takes: memory by its parts, and floating-point operations.

    No weight is needed (a model on the meta device will do) and none is read; the model is not changed. `options` are
    the fields of `deltaspec.language.conditions.Conditions`: batch, length, target_length, image_size, optimizer,
    dtype, autocast, base, checkpointing, labels, deltas. `example_inputs` are what the forward takes, as for `plan`;
    `batch` and `length` change their sizes. Raises DeltaSpecError with the findings of the specs, or of the options
    (DS506).

    >>> print(deltaspec.estimate(model, "specs/french.deltaspec.yaml", batch=8, length=512, optimizer="adamw"))
    """
    asked = conditions(options)
    return estimate_plan(model, resolve.plan(model, *specs, example_inputs=example_inputs), asked, example_inputs)


def _reported(key: str, message: str, hint: str) -> Diagnostic:
    return Diagnostic("DS506", message, f"estimate: {key}", suggestion=hint)


def estimate_plan(
    model: nn.Module, plan: Plan, asked: Conditions, example_inputs: Any = None, report: Report = _reported
) -> Estimate:
    """Estimate what a step of training a valid plan takes, on the model that it was made for; see `estimate`.

    `report` makes findings about single options.
    """
    return answer(Question(model, plan, asked, example_inputs, report), _compile)


def _compile(twin: nn.Module, plan: Plan, attached: Sequence[str], passes: bool) -> Compiled:
    """Compile a plan onto a twin without values, for training."""
    made, _, _ = build(twin, replace(plan, passes=plan.passes if passes else frozenset()), drawn=False)
    made.active.activate(attached)
    deltas = {delta.name: delta for delta in made.host.deltas.held()}
    trained = tuple(trainable(made.host, deltas, tuple(attached))) if attached else ()
    held = tuple(tensor for delta in deltas.values() for tensor in (*delta.parameters(), *delta.buffers()))
    return Compiled(made.host.backbone.train(), trained, held)
