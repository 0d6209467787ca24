"""How the evaluations of one job go: the best one, its tensors, and whether none was better for long."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import inf, isfinite
from typing import Any

import torch
from torch import Tensor

from deltaspec.backbone.sharded import sharded_as, unsharded
from deltaspec.deltas.modules import Delta
from deltaspec.diagnostics.findings import DeltaSpecError
from deltaspec.training.job_rows import unknown_jobs


class Course:
    """The evaluations of a job that stops once `patience` of them in a row were no better than the best."""

    def __init__(self, deltas: Mapping[str, Delta], patience: int, by: str) -> None:
        self._deltas, self.patience, self.by = deltas, patience, by
        self.best, self.best_step, self.stale = inf if by == "loss" else -inf, -1, 0
        self.kept: dict[str, Tensor] = {}
        """Its tensors at the best evaluation."""

    def _tensors(self) -> dict[str, Tensor]:
        return {f"{name}\n{key}": tensor for name, delta in self._deltas.items() for key, tensor in delta.tensors()}

    def measured(self, value: float, step: int) -> bool:
        """Take in an evaluation; return whether the job is to stop."""
        better = isfinite(value) and (value < self.best if self.by == "loss" else value > self.best)
        if better:
            self.best, self.best_step = value, step
            self.kept = {key: tensor.detach().clone() for key, tensor in self._tensors().items()}
        self.stale = 0 if better else self.stale + 1
        return self.stale >= self.patience

    @torch.no_grad()
    def put_back(self) -> None:
        """Give the deltas the values of the best evaluation, where there was one."""
        tensors = self._tensors()
        for key, value in self.kept.items():
            tensors[key].copy_(value)

    def state_dict(self) -> dict[str, Any]:
        """Return all that it is; every process that has a shard calls this."""
        kept = {key: unsharded(tensor).cpu() for key, tensor in self.kept.items()}
        return {"best": self.best, "best_step": self.best_step, "stale": self.stale, "kept": kept}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Become what another one was."""
        tensors = self._tensors()
        self.best, self.best_step, self.stale = state["best"], state["best_step"], state["stale"]
        self.kept = {key: sharded_as(tensors[key], value) for key, value in state["kept"].items()}


def patience_of(jobs: Sequence[str], given: int | Mapping[str, int] | None) -> dict[str, int]:
    """Return the patience of each job that has some. Raise ValueError for what is none, DeltaSpecError (DS382)."""
    by_name = given if isinstance(given, Mapping) else dict.fromkeys(jobs, given)
    if findings := unknown_jobs("patience", by_name, jobs):
        raise DeltaSpecError(findings)
    found = {name: most for name, most in by_name.items() if most is not None}
    for name, most in found.items():
        if not isinstance(most, int) or most < 1:
            raise ValueError(f"patience of the job {name!r} is 1 or more, not {most!r}")
    return found
