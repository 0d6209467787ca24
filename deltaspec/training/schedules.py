"""Schedules of learning rates: what the hints of deltas (`warmup`, `schedule`) make of them, step by step."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import ceil, cos, pi, sqrt
from typing import TYPE_CHECKING, Any

from torch.optim.lr_scheduler import LambdaLR

if TYPE_CHECKING:
    from torch.optim import Optimizer

_TIMESCALE = 10_000


@dataclass(frozen=True)  # without slots: a scheduler's state has what is in its dictionary
class Factor:
    """What a learning rate is multiplied by at a step; the first one is 0. The shapes are those of transformers."""

    schedule: str
    warmup: float
    """Steps in which it rises from 0, or which part of all steps, where that is below 1."""
    steps: int
    """Number of all steps."""

    @property
    def warmup_steps(self) -> int:
        """Number of steps in which it rises."""
        return ceil(self.warmup * self.steps) if self.warmup < 1 else int(self.warmup)

    def __call__(self, step: int) -> float:
        """Return the factor of a step."""
        rising = self.warmup_steps
        if step < rising:
            return step / rising
        if self.schedule == "inverse_sqrt":
            timescale = rising or _TIMESCALE
            return 1 / sqrt((step + timescale - rising) / timescale)
        done = min(1.0, (step - rising) / max(1, self.steps - rising))
        if self.schedule == "linear":
            return 1 - done
        return (1 + cos(pi * done)) / 2 if self.schedule == "cosine" else 1.0


def scheduler(optimizer: Optimizer, steps: int, *, last_step: int = -1) -> LambdaLR:
    """Return the scheduler for an optimizer of `c.parameter_groups()`, each group by its own hints.

    `steps` is the number of all steps; call `.step()` after each. Groups without hints keep their learning rate.

    >>> optimizer = torch.optim.AdamW(c.parameter_groups())
    >>> schedule = scheduler(optimizer, steps=300)
    """
    if steps < 1:
        raise ValueError(f"steps is 1 or more, not {steps}")
    factors: list[Callable[[int], float]] = [factor(group, steps) for group in optimizer.param_groups]
    return LambdaLR(optimizer, factors, last_step)


def factor(group: Mapping[str, Any], steps: int) -> Factor:
    """Return the factor of a group of an optimizer, by its hints."""
    return Factor(group.get("schedule", "constant"), group.get("warmup", 0), steps)
