"""Hints of deltas (`train:`) in the optimizer and the scheduler that a trainer of another library made."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch.optim.lr_scheduler import LambdaLR

from deltaspec.compiler.found import Held
from deltaspec.diagnostics.findings import DeltaSpecError, Diagnostic
from deltaspec.training.schedules import Factor

_HINTS = ("lr", "weight_decay", "warmup", "schedule")


def regroup(optimizer: Any, held: Sequence[Held]) -> None:
    """Give parameters of deltas that have hints groups of their own, which keep what no hint says."""
    for one in held:
        for group in one.compiled.parameter_groups():
            hints = {name: group[name] for name in _HINTS if name in group}
            own = {id(parameter) for parameter in group["params"]}
            for old in list(optimizer.param_groups) if hints else ():
                moved = [parameter for parameter in old["params"] if id(parameter) in own]
                if moved:
                    old["params"] = [parameter for parameter in old["params"] if id(parameter) not in own]
                    optimizer.add_param_group({**old, **hints, "params": moved, "delta": group["delta"]})
    # Trainers log the learning rate of the first group.
    optimizer.param_groups[:] = [group for group in optimizer.param_groups if group["params"]]


def reschedule(scheduler: Any, groups: Sequence[dict[str, Any]], steps: int) -> None:
    """Let groups follow their hints. Raise DeltaSpecError (DS568) where a scheduler has no course by group."""
    hinted = [index for index, group in enumerate(groups) if "schedule" in group or "warmup" in group]
    if hinted and not isinstance(scheduler, LambdaLR):
        names = ", ".join(sorted({groups[index]["delta"] for index in hinted}))
        message = f"the hints `warmup` and `schedule` of {names} have no place in a {type(scheduler).__name__}"
        hint = "take the hints out of the spec, or choose a schedule of the trainer that is a function of the step"
        raise DeltaSpecError([Diagnostic("DS568", message, "<spec>", suggestion=hint)])
    for index in hinted:
        group = groups[index]
        factor = Factor(group.get("schedule", "constant"), group.get("warmup", 0), steps)
        scheduler.lr_lambdas[index] = factor
        group["lr"] = scheduler.base_lrs[index] * factor(0)
        scheduler._last_lr[index] = group["lr"]  # noqa: SLF001 (what its first step has set)
