"""Many jobs in one pass: each step runs one batch with the rows of all jobs, and each job learns of its own rows."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from math import ceil, isfinite
from os import PathLike
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, distributed, nn

from deltaspec.backbone.sharded import in_parts
from deltaspec.diagnostics.findings import DeltaSpecError, Diagnostic
from deltaspec.training.batches import moved_to
from deltaspec.training.checkpoint import generators, read, set_generators, write
from deltaspec.training.interrupts import noticed
from deltaspec.training.job import Job
from deltaspec.training.measures import measures_of
from deltaspec.training.mixing import Mixed, Signature, mixed, parts
from deltaspec.training.modes import mode_of
from deltaspec.training.processes import are_several, gathered, require_any_delta, summed, unwrapped
from deltaspec.training.progress import shown
from deltaspec.training.results import Means, Results, table
from deltaspec.training.shares import Share, alone, over_all
from deltaspec.training.state import DIVERGED, FINISHED, JobState
from deltaspec.training.states import MakeOptimizer, require_alike, states_of

if TYPE_CHECKING:
    from rich.console import Console
    from torch.nn.parallel import DistributedDataParallel

    from deltaspec.compiler.compiled import CompiledModel

_END = object()
_Ran = tuple[Mixed, tuple[Any, ...], list[Any]]


class Training:
    """The training of several jobs on one backbone, in one pass.

    >>> jobs = [Job(name, data=batches) for name in c.deltas]
    >>> results = Training(c, jobs).run(checkpoint="run")

    Each job has an optimizer and a scheduler of its own, by the hints of its deltas (`train:`), and gets the gradient
    that it would get alone. `optimizer` makes one of an optimizer's groups; what hints do not give is its default.
    `pad` says what inputs are filled with, by name, where rows of one job are longer than those of another.

    Several processes may train together, each with its own part of every job's data: `c` is sharded by
    `fully_shard`, or in `DistributedDataParallel(c, find_unused_parameters=True)`.

    Raises DeltaSpecError with all that is wrong with the jobs: DS382, DS384, DS381, UnknownDeltaError.
    """

    def __init__(
        self,
        c: CompiledModel | DistributedDataParallel,
        jobs: Iterable[Job],
        *,
        optimizer: MakeOptimizer = torch.optim.AdamW,
        pad: Mapping[str, float] | None = None,
    ) -> None:
        self._called, self.model = c, unwrapped(c)
        self._signature = Signature.of(self.model.backbone, pad or {})
        self.states = states_of(self.model, list(jobs), optimizer)
        self._several = are_several(c)
        if self._several:
            require_any_delta(c)
            require_alike(self.states, shards=c is self.model)
        self.steps = 0
        """Steps that were taken."""
        self._mark: tuple[list[tuple[int, int]], dict[str, Any]] | None = None
        """Where the streams and generators stood before the step at hand; None between steps."""

    @property
    def running(self) -> list[JobState]:
        """The jobs that are not done."""
        return [state for state in self.states if state.running]

    @property
    def results(self) -> Results:
        """What came of the jobs so far."""
        return Results(state.result for state in self.states)

    def run(
        self,
        *,
        evaluate_every: int | None = None,
        checkpoint: str | PathLike[str] | None = None,
        save_every: int | None = None,
        progress: bool | Console = True,
        callback: Callable[[Training], Any] | None = None,
    ) -> Results:
        """Train until all jobs are done; what was attached, and each module's mode, are as they were afterwards.

        Jobs with `evaluation` are evaluated every so many steps, by default ten times in all, and at their end.
        `checkpoint` is a directory that is written every `save_every` steps (by default with each evaluation), at the
        end, and on Ctrl-C, which finishes the step at hand; `load` takes it up again. `progress` shows a table while
        it runs (False: nothing). `callback` is called after each step. Of several processes the
        first one shows, and writes.
        """
        every = evaluate_every or max(1, ceil(max(state.total for state in self.states) / 10))
        first = not self._several or distributed.get_rank() == 0
        try:
            with (
                mode_of(self._called, True),
                shown(lambda: table(self.results), first and progress),
                noticed() as interrupts,
            ):
                while self.running:
                    before = self.running
                    self.step()
                    due = self.steps % every == 0
                    self.evaluate([s for s in before if s.running == due or s.result.status == FINISHED])
                    if checkpoint is not None and (self.steps % save_every == 0 if save_every else due):
                        self.save(checkpoint)
                    if callback is not None:
                        callback(self)
                    if self._any(interrupts.pressed):
                        raise KeyboardInterrupt
            for state in self.states:
                state.finish()
        except KeyboardInterrupt as stop:
            self._rewind()
            if checkpoint is not None:
                self.save(checkpoint)
                stop.add_note(f"after {self.steps} steps; to go on: Training(c, jobs).load({str(checkpoint)!r}).run(…)")
            raise
        if checkpoint is not None:
            self.save(checkpoint)
        return self.results

    def step(self) -> dict[str, float]:
        """Take one step of each job that is running; return their losses. The model should be in training mode.

        A job whose loss or gradient is not finite ends (`diverged`), and the batch is run again without its rows. What
        raises an error leaves all as it was before the step.
        """
        running = self.running
        for state in running:
            state.clear()
        self._mark = [(s.stream.epoch, s.stream.taken) for s in self.states], generators()
        try:
            losses = self._learned(running)
        except BaseException:
            self._rewind()
            raise
        self._mark = None
        self.steps += 1
        for state in running:
            if state.running:
                state.apply(losses[id(state)])
        return {state.job.name: losses[id(state)] for state in running if state.result.status != DIVERGED}

    def _learned(self, running: Sequence[JobState]) -> dict[int, float]:
        """Give all jobs the gradients of a step; return their losses."""
        rounds = max((state.job.accumulate for state in running), default=0)
        taken = [[(s, s.stream.next()) for s in running if n < s.job.accumulate] for n in range(rounds)]
        before = generators()
        while True:
            losses = dict.fromkeys(map(id, running), 0.0)
            for pairs in taken:
                for state, loss in self._learn([pair for pair in pairs if pair[0].running]):
                    losses[id(state)] += loss / state.job.accumulate
            failed = [state for state in running if state.running and not state.clip()]
            if not failed:
                return losses
            in_parts(self._called)
            for state in failed:
                state.diverge(f"the norm of its gradient is {state.norm}")
            # What it gave the others in this step may be no number either: they learn as if it had not been there.
            for state in running:
                state.clear()
            set_generators(before)

    def _learn(self, given: Sequence[tuple[JobState, Any]]) -> list[tuple[JobState, float]]:
        """Add up the gradients of one batch of each job; return the losses of those that have finite ones."""
        pairs = list(given)
        before = generators()
        while pairs:
            shares = self._shares(pairs)
            names, device = [state.job.name for state, _ in pairs], self._device
            found = over_all(shares, names, device) if self._several else alone(shares)
            failed = {name: value for name, (value, _) in found.items() if not isfinite(value)}
            if not failed:
                torch.autograd.backward([shares[s.job.name].loss / s.job.accumulate for s, _ in pairs])
                return [(state, found[state.job.name][0]) for state, _ in pairs if state.job.name in found]
            # Not a number times nothing is not a number: its rows must not be in the batch that the others learn of.
            in_parts(self._called)
            for state, _ in pairs:
                if state.job.name in failed:
                    state.diverge(f"its loss is {failed[state.job.name]}")
            pairs = [(state, batch) for state, batch in pairs if state.job.name not in failed]
            set_generators(before)
        return []

    def _shares(self, pairs: Sequence[tuple[JobState, Any]]) -> dict[str, Share]:
        """Return what each job has in a batch of all of them."""
        batch, targets, outputs = self._forward(pairs, self._called)
        found = {}
        for (state, _), own, target, size in zip(pairs, outputs, targets, batch.sizes, strict=True):
            share = found[state.job.name] = Share.of(state.loss, own, target, size)
            if not isinstance(share.loss, Tensor) or share.loss.dim():
                message = f"the loss of the job {state.job.name!r} is not one number"
                raise DeltaSpecError([Diagnostic("DS384", message, "<jobs>", suggestion="return the mean of its rows")])
        return found

    @property
    def _device(self) -> torch.device:
        return self.states[0].parameters[0].device

    def _forward(self, pairs: Sequence[tuple[JobState, Any]], called: nn.Module) -> _Ran:
        """Run the rows of batches together: the mixed batch, and the targets and outputs of each job."""
        moved = [moved_to(batch, self._device) for _, batch in pairs]
        batch = mixed(self._signature, [state.job.name for state, _ in pairs], moved)
        counted = zip(pairs, batch.sizes, strict=True)
        rows = [state.job.deltas for (state, _), size in counted for _ in range(size)]
        outputs = called(*batch.args, **batch.kwargs, deltas=rows)
        return batch, batch.targets(outputs), parts(outputs, batch.sizes)

    @torch.no_grad()
    def evaluate(self, states: Iterable[JobState] | None = None) -> None:
        """Evaluate jobs, by default those that are running, in batches of rows of all of them."""
        chosen = self.running if states is None else states
        found = [(state, Means()) for state in chosen if state.job.evaluation is not None]
        with self._evaluating():
            # A loader draws a seed when it is begun, and when it is read.
            waiting = [(state, iter(state.job.evaluation or ()), means) for state, means in found]
            while waiting:
                taken = [(state, next(batches, _END), means) for state, batches, means in waiting]
                waiting = [each for each, (_, batch, _) in zip(waiting, taken, strict=True) if batch is not _END]
                self._measure([each for each in taken if each[1] is not _END])
        if self._several:
            for (_, means), *others in zip(found, *gathered([means for _, means in found]), strict=True):
                means.become(others)
        in_parts(self._called)
        for state, means in found:
            state.evaluated(means.of(state.job.name))

    def _measure(self, taken: Sequence[tuple[JobState, Any, Means]]) -> None:
        """Add what is measured on a batch of each job to their means."""
        if not taken:
            return
        pairs = [(state, batch) for state, batch, _ in taken]
        batch, targets, outputs = self._forward(pairs, self.model)
        for (state, _, means), size, own, target in zip(taken, batch.sizes, outputs, targets, strict=True):
            means.add({"loss": float(state.loss(own, target)), **measures_of(state.job, own, target)}, size)

    @contextmanager
    def _evaluating(self) -> Iterator[None]:
        """Run in evaluation mode, and let no number be drawn of the training's generators."""
        before = generators()
        try:
            with mode_of(self.model, False):
                yield
        finally:
            set_generators(before)

    def save(self, directory: str | PathLike[str]) -> None:
        """Write all that the next step depends on: parameters, optimizers, places in the data, generators, results."""
        places, own = self._mark or ([(s.stream.epoch, s.stream.taken) for s in self.states], generators())
        jobs = {s.job.name: s.state_dict(place) for s, place in zip(self.states, places, strict=True)}
        each = gathered(own) if self._several else [own]
        if not self._several or distributed.get_rank() == 0:
            write(directory, {"jobs": jobs, "steps": self.steps, "generators": each})
        if self._several:
            distributed.barrier()

    def _any(self, pressed: bool) -> bool:
        """Return whether this is so in any of the processes."""
        return bool(summed([[pressed]], self._device)[0][0]) if self._several else pressed

    def load(self, directory: str | PathLike[str]) -> Training:
        """Take up what `save` wrote: the next step is the one that would have been taken then, to the bit.

        The jobs must be those that it was written with; raises DeltaSpecError (DS385) with all that does not fit.
        """
        content = read(directory, self.states)
        for state in self.states:
            state.load_state_dict(content["jobs"][state.job.name])
        self.steps = content["steps"]
        each = content["generators"]
        set_generators(each[distributed.get_rank() % len(each) if self._several else 0])
        return self

    def _rewind(self) -> None:
        """Undo a step that was not finished: none of its gradients were applied."""
        if self._mark is None:
            return
        places, states = self._mark
        for state, place in zip(self.states, places, strict=True):
            state.stream.seek(*place)
            state.clear()
        set_generators(states)
        self._mark = None
