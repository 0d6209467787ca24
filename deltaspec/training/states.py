"""The states of the jobs that a training is given, once all that is wrong with them is told."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from deltaspec.diagnostics.findings import DeltaSpecError, Diagnostic
from deltaspec.training.batches import read_by_many
from deltaspec.training.job import Job
from deltaspec.training.losses import Loss, usual_loss
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
            message = f"the job {job.name!r} has no loss, and a {type(c.backbone).__name__} has no usual one"
            refuse("DS384", message, "give it one: Job(…, loss=lambda outputs, batch: …)")
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
