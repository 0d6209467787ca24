"""The states of the jobs that a training is given, once all that is wrong with them is told; alike in all processes."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence, Sized
from typing import TYPE_CHECKING, Any

from deltaspec.diagnostics.findings import DeltaSpecError, Diagnostic
from deltaspec.training.batches import read_by_many
from deltaspec.training.job import Job
from deltaspec.training.losses import Loss, usual_loss, without_loss
from deltaspec.training.processes import gathered
from deltaspec.training.standing import refusals, trained_of
from deltaspec.training.state import JobState

if TYPE_CHECKING:
    from torch.optim import Optimizer

    from deltaspec.compiler.compiled import CompiledModel

MakeOptimizer = Callable[[list[dict[str, Any]]], "Optimizer"]


def states_of(c: CompiledModel, jobs: Sequence[Job], optimizer: MakeOptimizer) -> list[JobState]:
    """Make what each job has of its own. Raises DeltaSpecError with all that is wrong with the jobs."""
    findings: list[Diagnostic] = []

    def refuse(code: str, message: str, hint: str) -> None:
        findings.append(Diagnostic(code, message, "<jobs>", suggestion=hint))

    if not jobs:
        refuse("DS382", "there is no job", "give some: Training(c, [Job('french', data=…)])")
    named: set[str] = set()
    usual, chosen = usual_loss(c.backbone), list[Loss]()
    jobs = [_named(c, job) for job in jobs]
    standing = refusals(c, ((job.name, job.deltas) for job in jobs))
    for job, wrong in zip(jobs, standing, strict=True):
        if job.name in named:
            refuse("DS382", f"two jobs are called {job.name!r}", "give one of them a name of its own: Job(…, name=…)")
        named.add(job.name)
        findings += wrong
        if job.loss is None and usual is None:
            findings.append(without_loss(job.name, c.backbone, "Job(…, loss=lambda outputs, batch: …)"))
        elif (loss := job.loss or usual) is not None:
            chosen.append(loss)
        try:
            job.total()
        except DeltaSpecError as error:
            findings += error.diagnostics
    names = [job.name for job in jobs]
    for data in ([job.data for job in jobs], [job.evaluation for job in jobs]):
        findings += read_by_many(names, data)
    if findings:
        raise DeltaSpecError(findings)
    hints = {delta.name: delta.train for delta in c.plan.deltas}
    made = []
    for job, loss in zip(jobs, chosen, strict=True):
        own = trained_of(c, job.deltas)
        given = (train.seed for delta in own if (train := hints[delta]) is not None)
        seed = next((s for s in (job.seed, *given) if s is not None), 0)
        made.append(JobState(job, {d: c.deltas[d] for d in own}, c.parameter_groups(*own), loss, optimizer, seed))
    return made


def _named(c: CompiledModel, job: Job) -> Job:
    """Return a job that is called as a delta that it trains, where it was called as one that it stands on."""
    known = {delta.name for delta in c.plan.deltas}
    trained = trained_of(c, [delta for delta in job.deltas if delta in known])
    if job.name != job.deltas[0] or job.name in trained or not trained:
        return job
    job = copy.copy(job)
    job.name = trained[0]
    return job


def require_alike(states: Sequence[JobState], *, shards: bool) -> None:
    """Raise DeltaSpecError (DS382) where processes have other jobs than the first one: they would wait for each other.

    Where weights are in `shards`, they have to run as many batches of an evaluation, too.
    """
    own = {}
    for state in states:
        job, evaluation = state.job, state.job.evaluation
        length = len(evaluation) if shards and isinstance(evaluation, Sized) else evaluation is not None
        own[job.name] = (job.deltas, state.total, job.accumulate, job.best, job.patience, job.keep_best, length)
    found, each = list[Diagnostic](), gathered(own)
    for rank, theirs in enumerate(each):
        for name in each[0] | theirs:
            if theirs.get(name) != each[0].get(name):
                message = f"the job {name!r} of process {rank} is not that of process 0"
                hint = "give all processes the same jobs, with data (and evaluation) of as many batches"
                found.append(Diagnostic("DS382", message, "<jobs>", suggestion=hint))
        if list(theirs) != list(each[0]) and not found:
            message, hint = f"process {rank} has its jobs in another order", "give all processes the same list of jobs"
            found.append(Diagnostic("DS382", message, "<jobs>", suggestion=hint))
    if found:
        raise DeltaSpecError(found)
