"""`expect: memory`: what a spec's author counts on, compared with what a step of training is estimated to take."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from deltaspec.costs.estimate import Estimate, ways_out
from deltaspec.costs.estimator import Report
from deltaspec.costs.text import conditions_in_words
from deltaspec.diagnostics.findings import DeltaSpecError, Diagnostic
from deltaspec.language.conditions import Conditions, shown_amount
from deltaspec.language.model import DeltaSpec
from deltaspec.planning.plan import Plan
from deltaspec.planning.planned import MemoryUse


def with_memory(
    plan: Plan, estimated: Callable[[Plan, Conditions, Report], Estimate], before: Plan | None = None
) -> Plan:
    """Return a plan with the memory that its specs expect something of; the same plan where none does.

    Each spec's deltas are estimated as if they were alone; those of specs in the plan `before` were. Raises
    DeltaSpecError with the findings of all specs.
    """
    if not any(spec.expect and spec.expect.memory for spec in plan.specs):
        return plan
    checks: list[str] = []
    uses: list[MemoryUse | None] = []
    findings: list[Diagnostic] = []
    known = {} if before is None else {id(spec): use for spec, use in zip(before.specs, before.memory, strict=False)}
    for spec, part in zip(plan.specs, plan.parts(), strict=True):
        if id(spec) in known:
            uses.append(known[id(spec)])
            continue
        try:
            use, words = _compared(spec, part, estimated)
        except DeltaSpecError as error:
            findings += error.diagnostics
            continue
        uses.append(use)
        checks += words
    if findings:
        raise DeltaSpecError(findings)
    made = replace(plan, checks=(*plan.checks, *checks), memory=tuple(uses))
    made.__dict__["structure"] = plan.structure
    return made


def _compared(
    spec: DeltaSpec, part: Plan, estimated: Callable[[Plan, Conditions, Report], Estimate]
) -> tuple[MemoryUse | None, tuple[str, ...]]:
    memory = spec.expect and spec.expect.memory
    if not memory:
        return None, ()

    def report(key: str, message: str, hint: str) -> Diagnostic:
        return spec.diagnostic("DS506", message, ("expect", "memory", key), hint)

    found = estimated(part, memory, report)
    what = f"a step of training takes {shown_amount(found.total)} ({conditions_in_words(found)})"
    sizes = ", ".join(f"{name} {shown_amount(size)}" for name, size in found.parts.items() if size is not None)
    most = f" (most is kept from {found.places[0].name})" if found.places else ""
    if found.total > memory.bytes:
        message = f"{what}, expected at most {shown_amount(memory.bytes)}"
        hint = f"{sizes}{most}; lower it: {', '.join(ways_out(found))}"
        raise DeltaSpecError([spec.diagnostic("DS505", message, ("expect", "memory"), hint)])
    if not found.complete:
        message = f"it cannot be known whether a step of training takes at most {shown_amount(memory.bytes)}"
        hint = f"{found.notes[0]}; or delete the expectation"
        raise DeltaSpecError([spec.diagnostic("DS507", message, ("expect", "memory"), hint)])
    used = MemoryUse(
        memory.max, found.conditions.model_dump(mode="json", exclude={"max"}, exclude_none=True), found.total
    )
    return used, (f"{what}, expected at most {shown_amount(memory.bytes)}",)
