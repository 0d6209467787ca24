"""How the training of one job went: losses step by step, evaluations, how it ended."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from deltaspec.training.kept import is_better


@dataclass(frozen=True)
class Evaluation:
    """One evaluation of a job."""

    step: int
    """Steps that were taken before it."""
    measures: Mapping[str, float]
    """The mean loss, and the metrics of the job."""


@dataclass
class JobResult:
    """How the training of one job went."""

    name: str
    deltas: tuple[str, ...]
    steps: int
    """Number of steps that were planned."""
    best_by: str
    """The measure by which evaluations are compared."""
    status: str = "running"
    """`running`, `finished`, `stopped early` or `diverged`."""
    reason: str = ""
    """Why it ended before its last step."""
    losses: list[float] = field(default_factory=list)
    """The loss of each step."""
    rates: list[float] = field(default_factory=list)
    """The learning rate of each step: of its first delta's first group."""
    evaluations: list[Evaluation] = field(default_factory=list)
    best_number: int | None = None
    """Which of the evaluations is the best one; None where there was none."""

    @property
    def step(self) -> int:
        """Number of steps that were taken."""
        return len(self.losses)

    @property
    def best(self) -> Mapping[str, float]:
        """The measures of the best evaluation; none where there was none."""
        return {} if self.best_number is None else self.evaluations[self.best_number].measures

    @property
    def best_step(self) -> int | None:
        """Number of steps that were taken before the best evaluation; None where there was none."""
        return None if self.best_number is None else self.evaluations[self.best_number].step

    def took(self, loss: float, rate: float) -> None:
        """Take in a step."""
        self.losses.append(loss)
        self.rates.append(rate)

    def measured(self, measures: Mapping[str, float]) -> bool:
        """Take in an evaluation; return whether it is the best one so far."""
        if self.best_by not in measures:
            raise KeyError(f"the job {self.name!r} has no measure {self.best_by!r}; there are: {', '.join(measures)}")
        before = self.best.get(self.best_by)
        self.evaluations.append(Evaluation(self.step, dict(measures)))
        if better := is_better(measures[self.best_by], before, self.best_by):
            self.best_number = len(self.evaluations) - 1
        return better

    def end(self, status: str, reason: str) -> None:
        """End before the last step."""
        self.status, self.reason = status, reason

    def to_data(self) -> dict[str, Any]:
        """Return it as JSON data."""
        return {**asdict(self), "deltas": list(self.deltas)}

    @classmethod
    def from_data(cls, data: Mapping[str, Any]) -> JobResult:
        """Read what `to_data` gave."""
        evaluations = [Evaluation(each["step"], each["measures"]) for each in data["evaluations"]]
        return cls(**{**data, "deltas": tuple(data["deltas"]), "evaluations": evaluations})
