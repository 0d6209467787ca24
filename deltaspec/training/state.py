"""One job while it is trained: its parameters, optimizer and stream, how far it is, and what came of it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from math import isfinite
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from deltaspec.backbone.sharded import sharded_as, unsharded
from deltaspec.training.batches import Stream
from deltaspec.training.job import Job
from deltaspec.training.kept import copies_of, put_back, tensors_of
from deltaspec.training.losses import Loss
from deltaspec.training.outcome import JobResult
from deltaspec.training.schedules import scheduler

if TYPE_CHECKING:
    from torch.optim import Optimizer

    from deltaspec.deltas.modules import Delta

RUNNING, FINISHED, STOPPED, DIVERGED = "running", "finished", "stopped early", "diverged"


class JobState:
    """What a job has of its own while it is trained."""

    def __init__(
        self,
        job: Job,
        deltas: Mapping[str, Delta],
        groups: list[dict[str, Any]],
        loss: Loss,
        optimizer: Callable[[list[dict[str, Any]]], Optimizer],
        seed: int,
    ) -> None:
        self.job, self.deltas, self.loss = job, deltas, loss
        self.parameters: list[nn.Parameter] = [p for group in groups for p in group["params"]]
        self.total = job.total()
        self.optimizer = optimizer(groups)
        self.scheduler = scheduler(self.optimizer, self.total)
        self.stream = Stream(job.name, job.data, seed)
        self.result = JobResult(job.name, job.deltas, self.total, job.best)
        self.kept = copies_of(self.deltas)
        """Its tensors as they were at the best evaluation, or at the last one, or at the start."""
        self.stale = 0
        """Evaluations since the best one."""
        self.norm = 0.0
        """Norm of the gradient of its last step, before it was clipped."""

    @property
    def running(self) -> bool:
        """Whether its rows are in the batch."""
        return self.result.status == RUNNING

    def clear(self) -> None:
        """Drop its gradients."""
        for parameter in self.parameters:
            parameter.grad = None

    def clip(self) -> bool:
        """Clip its gradient, where it is to be; return whether it is finite."""
        self.norm = _norm(self.parameters, self.job.max_norm)
        return isfinite(self.norm)

    def apply(self, loss: float) -> None:
        """Take a step of its optimizer with the gradients that there are."""
        rate = self.optimizer.param_groups[0]["lr"]  # of the delta that the job is called by, its first factor
        self.optimizer.step()
        self.scheduler.step()
        self.clear()
        self.result.took(loss, float(rate))
        if self.result.step == self.total:
            self.result.status = FINISHED

    def diverge(self, why: str) -> None:
        """End it for numbers that are not finite; its tensors become what they were at its last evaluation."""
        self.clear()
        put_back(self.deltas, self.kept)
        at = self.result.evaluations[-1].step if self.result.evaluations else 0
        at = self.result.best_step if self.job.keep_best and self.result.best_step is not None else at
        self.result.end(DIVERGED, f"{why} at step {self.result.step + 1}; its deltas are as at step {at}")

    def evaluated(self, measures: Mapping[str, float]) -> None:
        """Take in an evaluation: remember the best one, and stop where none was better for long."""
        better = self.result.measured(measures)
        if (better or not self.job.keep_best) and all(map(isfinite, measures.values())):
            self.kept = copies_of(self.deltas)
        self.stale = 0 if better else self.stale + 1
        if self.job.patience is not None and self.stale >= self.job.patience and self.running:
            self.result.end(STOPPED, f"{self.stale} evaluations without a better {self.job.best}")

    def finish(self) -> None:
        """Give a job that has ended the parameters of its best evaluation, where it keeps these."""
        if self.job.keep_best and self.result.best_step is not None:
            put_back(self.deltas, self.kept)

    def state_dict(self, place: tuple[int, int]) -> dict[str, Any]:
        """Return all that it is, with its stream at a place; every process that has a shard calls this."""
        return {
            "tensors": _whole(copies_of(self.deltas)),
            "optimizer": _whole(self.optimizer.state_dict()),
            "scheduler": self.scheduler.state_dict(),
            "stream": [self.stream.seed, *place],
            "kept": _whole(self.kept),
            "stale": self.stale,
            "result": self.result.to_data(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Become what another one was."""
        put_back(self.deltas, state["tensors"])
        self.optimizer.load_state_dict(state["optimizer"])
        for parameter, values in self.optimizer.state.items():
            for key, value in values.items():
                if isinstance(value, Tensor) and value.shape == parameter.shape:
                    values[key] = sharded_as(parameter, value)
        self.scheduler.load_state_dict(state["scheduler"])
        self.stream.seed, epoch, taken = state["stream"]
        self.stream.seek(epoch, taken)
        tensors = tensors_of(self.deltas)
        self.kept = {key: sharded_as(tensors[key], value) for key, value in state["kept"].items()}
        self.stale = state["stale"]
        self.result = JobResult.from_data(state["result"])


def _norm(parameters: Iterable[nn.Parameter], most: float | None) -> float:
    """Return the norm of the gradient, which becomes no larger than `most`."""
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    norm = nn.utils.get_total_norm(gradients)
    if most is not None and gradients:
        nn.utils.clip_grads_with_norm_(parameters, most, norm)
    return float(unsharded(norm))


def _whole(value: Any) -> Any:
    """Return a state whose tensors are whole."""
    if isinstance(value, dict):
        return {key: _whole(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_whole(each) for each in value]
    return unsharded(value) if isinstance(value, Tensor) else value
