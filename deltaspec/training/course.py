"""How the evaluations of one job go: the best one, its tensors, and whether none was better for long."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from deltaspec.backbone.sharded import sharded_as, unsharded
from deltaspec.deltas.modules import Delta
from deltaspec.diagnostics.findings import DeltaSpecError
from deltaspec.training.job_rows import unknown_jobs
from deltaspec.training.kept import copies_of, is_better, put_back, tensors_of


class Course:
    """The evaluations of a job that stops once `patience` of them in a row were no better than the best."""

    def __init__(self, deltas: Mapping[str, Delta], patience: int, by: str) -> None:
        self._deltas, self.patience, self.by = deltas, patience, by
        self.best: float | None = None
        self.best_step, self.stale = -1, 0
        self.kept: dict[str, Tensor] = {}
        """Its tensors at the best evaluation."""

    def measured(self, value: float, step: int) -> bool:
        """Take in an evaluation; return whether the job is to stop."""
        if better := is_better(value, self.best, self.by):
            self.best, self.best_step, self.kept = value, step, copies_of(self._deltas)
        self.stale = 0 if better else self.stale + 1
        return self.stale >= self.patience

    def put_back(self) -> None:
        """Give the deltas the values of the best evaluation, where there was one."""
        if self.kept:
            put_back(self._deltas, self.kept)

    def state_dict(self) -> dict[str, Any]:
        """Return all that it is; every process that has a shard calls this."""
        kept = {key: unsharded(tensor).cpu() for key, tensor in self.kept.items()}
        return {"best": self.best, "best_step": self.best_step, "stale": self.stale, "kept": kept}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Become what another one was."""
        tensors = tensors_of(self._deltas)
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
