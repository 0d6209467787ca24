"""Estimating: from a plan, its model and what a step is for to an estimate, without a weight."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from deltaspec.backbone.clone import hollow
from deltaspec.costs.batches import batches, settled
from deltaspec.costs.estimate import Estimate, places_of
from deltaspec.costs.held import bytes_of, configured, saved_by
from deltaspec.costs.optimizers import Trained, state_bytes
from deltaspec.costs.trial import Compiled, Trial, on_fakes, on_meta, on_zeros
from deltaspec.costs.twins import checkpoint, twin
from deltaspec.diagnostics.findings import DeltaSpecError, Diagnostic
from deltaspec.diagnostics.wording import closest
from deltaspec.language.conditions import Conditions
from deltaspec.planning.plan import Plan
from deltaspec.planning.planned import PlannedDelta

Report = Callable[[str, str, str], Diagnostic]
"""What makes a finding about an option: of its key, what is wrong, and the way out."""
Compile = Callable[[nn.Module, Plan, Sequence[str], bool], Compiled]
"""What compiles a plan onto a twin of its model with these deltas attached, with passes for training or without."""


@dataclass(frozen=True)
class Question:
    """What is to be estimated."""

    model: nn.Module
    plan: Plan
    conditions: Conditions
    example_inputs: Any
    report: Report
    beside: bool = True
    """Whether to say what is kept without passes, too, which takes a second step."""

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the deltas that are attached and trained: where all start detached, the one with most parameters."""
        asked, deltas = self.conditions.deltas, self.plan.deltas
        if asked is None and self.alternatives:
            return (max(self.alternatives, key=lambda d: d.trainable).name,)
        return tuple(d.name for d in deltas if (d.attached if asked is None else d.name in asked))

    @property
    def alternatives(self) -> tuple[PlannedDelta, ...]:
        """The deltas that can be trained, where none of these starts attached, as those of a matrix."""
        trained = tuple(d for d in self.plan.deltas if d.derived is None)
        return () if any(d.attached for d in trained) else trained

    def twin(self) -> nn.Module:
        """Return the structure of the model, as the conditions want it. Raises DeltaSpecError (DS506)."""
        dtype = self.conditions.dtype
        made = twin(self.model, None if dtype is None else getattr(torch, dtype))
        if self.conditions.checkpointing and not checkpoint(made):
            message = f"{self.plan.model_class} has no gradient checkpointing that can be turned on"
            raise DeltaSpecError([self.report("checkpointing", message, "leave checkpointing out")])
        return made


def answer(question: Question, compile_onto: Compile) -> Estimate:
    """Estimate a step of training. The model is not changed, and none of its values is read.

    Raises DeltaSpecError where the conditions do not fit the model or the plan (DS506).
    """
    model, plan = question.model, question.plan
    given, wrong = settled(question.conditions, model, plan.table, question.example_inputs)
    wrong += _unknown(given, plan)
    if wrong:
        raise DeltaSpecError([question.report(*finding) for finding in wrong])
    question = replace(question, conditions=given)
    compiled = compile_onto(question.twin(), plan, question.names, True)
    trained = [Trained(tuple(p.shape), p.element_size()) for p in compiled.trained]
    backbone, unpacking = _backbone(question)
    made = Estimate(
        given, question.names, backbone, bytes_of(compiled.deltas), sum(one.bytes for one in trained),
        state_bytes(given.optimizer, trained),
    )  # fmt: skip
    ran = _trial(question, compile_onto, compiled, passes=True)
    if ran.batch is None or ran.step is None:
        why = "the model's inputs are not known: pass example_inputs" if ran.batch is None else ran.failure
        note = f"kept activations, working memory and FLOPs are not known without weights ({why})"
        return replace(made, inputs=str(ran.batch or ""), notes=(note,))
    step = ran.step
    without: int | None = step.kept
    if question.beside and plan.passes and ran.passed:
        other = _trial(question, compile_onto, compile_onto(question.twin(), plan, question.names, False), passes=False)
        without = None if other.step is None else other.step.kept
    return replace(
        made,
        inputs=str(ran.batch),
        activations=step.kept,
        activations_without_passes=without if question.beside else None,
        working=max(0, step.peak - step.kept - made.gradients) + unpacking,
        forward_flops=step.forward_flops,
        backward_flops=step.backward_flops,
        places=places_of(step.places),
        notes=tuple(_notes(ran, question)),
    )


def _unknown(given: Conditions, plan: Plan) -> list[tuple[str, str, str]]:
    known = [delta.name for delta in plan.deltas]
    found = []
    for name in given.deltas or ():
        if name not in known:
            near = closest(name, known)
            hint = f"did you mean {near!r}? " if near else ""
            found.append(("deltas", f"no delta is named {name!r}", f"{hint}known: {', '.join(known)}"))
    return found


def _notes(ran: Trial, question: Question) -> list[str]:
    """Return what the numbers leave out."""
    given, notes = question.conditions, []
    if given.deltas is None and len(question.alternatives) > 1:
        many = f"of {len(question.alternatives)} deltas, which all start detached"
        notes.append(f"{many}, the one with most parameters is trained; name others: deltas=…")
    if question.plan.passes and not ran.passed:
        notes.append("what passes save is not counted: this step ran on fake tensors, which they leave alone")
    labelled = ran.batch is not None and "labels" in ran.batch.kwargs
    if ran.failure is not None and given.labels:
        notes.append(f"{'another form of' if labelled else 'without'} labels: {ran.failure}")
    return notes


def _backbone(question: Question) -> tuple[int, int]:
    """Return the bytes of the backbone, and those of the largest weight while its codes are unpacked."""
    model, given = question.model, question.conditions
    if given.dtype is not None:
        model = twin(model, getattr(torch, given.dtype))
    held = bytes_of([*model.parameters(), *model.buffers()])
    form = given.base or configured(question.model)
    if form is None:
        return held, 0
    less, largest = saved_by(form, model)
    return held - less, largest


def _trial(question: Question, compile_onto: Compile, compiled: Compiled, *, passes: bool) -> Trial:
    """Run a step of a compiled twin; where its forward looks at values, of one that is made of zeros."""
    model, given = question.model, question.conditions
    forms = list(batches(model, given, question.example_inputs))
    if not forms:
        return Trial(None, None)
    device = _device(model)
    if device == "cpu" and given.autocast is None:
        ran = on_meta(compiled, forms, given)
        if ran.step is not None:
            return ran
    ran = on_fakes(compiled, forms, given, device)
    if ran.step is not None:
        return ran
    values = compile_onto(hollow(question.twin()), question.plan, question.names, passes)
    return on_zeros(values, forms, given)


def _device(model: nn.Module) -> str:
    """Return the kind of device whose operators are counted: the model's own, or the CPU."""
    kind = next((parameter.device.type for parameter in model.parameters()), "cpu")
    return "cpu" if kind == "meta" else kind
