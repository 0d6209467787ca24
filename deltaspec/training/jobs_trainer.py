"""transformers' Trainer for many jobs on one backbone: each example says which job it is of.

>>> rows = [{"job": "french", "input_ids": [5, 7], "labels": 1}, …]
>>> trainer = JobsTrainer(model=c, args=args, train_dataset=rows)
>>> trainer.train(resume_from_checkpoint=True)
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from math import isfinite
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer

from deltaspec.backbone.sharded import in_parts, unsharded
from deltaspec.compiler.compiled import CompiledModel
from deltaspec.compiler.found import Held, held_in
from deltaspec.diagnostics.findings import DeltaSpecError, Diagnostic
from deltaspec.training.course import Course, patience_of
from deltaspec.training.job_rows import COLUMN, WithJobs, by_job
from deltaspec.training.losses import Loss, losses_of
from deltaspec.training.measures import measure_of
from deltaspec.training.mixing import Signature, picked
from deltaspec.training.processes import are_several, require_any_delta
from deltaspec.training.results import Means
from deltaspec.training.shares import Share, alone, nothing_of, over_all
from deltaspec.training.standing import refusals, trained_of
from deltaspec.training.trainer import DeltaTrainerMixin

STATES = "job_states.pt"
"""File of a checkpoint with the jobs that ended, and how the evaluations of the others go."""


class JobsTrainer(DeltaTrainerMixin, Trainer):
    """A Trainer whose batches have rows of several jobs, each under its own deltas and learning of its own rows.

    `model` is what `deltaspec.compile` returns. `jobs` are the jobs by name, each with its deltas, those that it stands
    on (frozen, derived, of a library) included; left out, each delta that is not frozen is a job. Each example has the
    name of its job under "job". The loss of a batch is the sum of the jobs', each the mean over its own rows: the
    model's usual one of `labels`, or `job_loss(outputs, batch)`, or one a job by name.

    Learning rates and schedules are those of the specs (`train:`), else of the arguments; gradients are clipped job by
    job. Logs and evaluations have each job's own numbers (`loss_french`, `eval_french_loss`, `eval_french_accuracy`).
    Checkpoints hold the deltas as `c.save` writes them. A job whose loss is not finite ends, and the others go on.

    `patience=3` ends a job after three evaluations without a better one (or one number a job, by name): its rows leave
    the batch, and its deltas become those of its best evaluation. Better is less loss, or more of the metric `best`.
    """

    model: Any
    args: Any
    state: Any
    optimizer: Any
    lr_scheduler: Any
    eval_dataset: Any
    _signature_columns: Any

    def __init__(
        self,
        *args: Any,
        jobs: Mapping[str, str | Sequence[str]] | None = None,
        job_loss: Loss | Mapping[str, Loss] | None = None,
        patience: int | Mapping[str, int] | None = None,
        best: str = "loss",
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        if not isinstance(self.model, CompiledModel):
            raise TypeError(f"model is what deltaspec.compile returns, not a {type(self.model).__name__}")
        trained = trained_of(self.model, [delta.name for delta in self.model.plan.deltas])
        given = {name: name for name in trained} if jobs is None else jobs
        self.jobs = {name: (own,) if isinstance(own, str) else tuple(own) for name, own in given.items()}
        findings = [finding for own in refusals(self.model, self.jobs.items()) for finding in own]
        if not self.jobs:
            message, hint = "there is no job", "compile a spec with a delta to train, or name the jobs: jobs={…}"
            findings.append(Diagnostic("DS382", message, "<jobs>", suggestion=hint))
        if findings:
            raise DeltaSpecError(findings)
        self.diverged: dict[str, int] = {}
        """Jobs that ended because their loss was not finite, and the step."""
        self.stopped: dict[str, int] = {}
        """Jobs that ended because no evaluation was better for long, and the step."""
        self.loss_is_scaled_for_ga = False
        self._names = list(self.jobs)
        self._losses = losses_of(self.model.backbone, self._names, job_loss)
        self._patience, self._best = patience_of(self._names, patience), best
        self._courses: dict[str, Course] = {}
        self._means: dict[str, Means] = {}
        self._present: set[str] | None = None
        """Jobs with rows in the step at hand; None between steps."""
        self.data_collator = WithJobs(self.data_collator, self._names)

    # Learning

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train; jobs with `patience` have the parameters of their best evaluations afterwards."""
        if self._patience and (self.eval_dataset is None or self.args.eval_strategy == "no"):
            raise ValueError("patience counts evaluations: give eval_dataset=…, and eval_strategy in the arguments")
        self.diverged, self.stopped = {}, {}
        self._courses = {name: Course(self._own(name), most, self._best) for name, most in self._patience.items()}
        found = super().train(*args, **kwargs)
        for course in self._courses.values():
            course.put_back()
        return found

    def _own(self, name: str) -> dict[str, Any]:
        """Return the deltas that a job trains."""
        return {delta: self.model.deltas[delta] for delta in trained_of(self.model, self.jobs[name])}

    @property
    def _left(self) -> list[str]:
        """Names of the jobs that are trained."""
        return [name for name in self.jobs if name not in self.diverged and name not in self.stopped]

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Return the sum of the jobs' losses, each the mean over its rows (of all processes), and the outputs.

        Raises DeltaSpecError (DS387) once no job is left.
        """
        numbers: Tensor = inputs[COLUMN]
        batch = {key: value for key, value in inputs.items() if key != COLUMN}
        if not self.model.training:
            outputs = self._outputs(model, batch, numbers)
            total = torch.stack([share.loss for share in self._shares(outputs, batch, numbers).values()]).sum()
            return (total, outputs) if return_outputs else total
        if several := are_several(model):
            require_any_delta(model)
        while True:
            kept = torch.isin(numbers, numbers.new_tensor([self._names.index(name) for name in self._left]))
            batch, numbers = picked(batch, kept.nonzero().flatten(), len(kept)), numbers[kept]
            if not (self._left if several else len(numbers)):
                return self._nothing()
            outputs = self._outputs(model, batch, numbers) if len(numbers) else self._stand_in(model, inputs)
            shares = self._shares(outputs, batch, numbers)
            found = over_all(shares, self._left, self.args.device) if several else alone(shares)
            failed = {name: value for name, (value, _) in found.items() if not isfinite(value)}
            if not failed:
                break
            for name, value in failed.items():  # the batch is run again without its rows: not a number spreads
                self._diverge(name, value)
        self._present = (self._present or set()) | found.keys()
        for name, (value, rows) in found.items():
            self._means.setdefault(name, Means()).add({"loss": value}, rows)
        # A process with nothing to learn takes part in what the others do.
        losses = [share.loss for share in shares.values()] or [nothing_of(outputs)]
        total = torch.stack(losses).sum()
        return (total, outputs) if return_outputs else total

    def _diverge(self, name: str, value: float) -> None:
        """End a job whose loss, or the norm of whose gradient, is not finite."""
        self.diverged[name] = self.state.global_step + 1
        for parameter in self.model.trainable_parameters(*self.jobs[name]):
            parameter.grad = None
        self.log({f"diverged_{name}": value})

    def _nothing(self) -> Tensor:
        """Return a loss that nothing is learned of: the batch had only rows of jobs that ended."""
        if not self._left and not self.stopped:
            message = f"the losses of all jobs are not finite: {', '.join(self.diverged)}"
            raise DeltaSpecError([Diagnostic("DS387", message, "<jobs>", suggestion="take lower learning rates")])
        self.control.should_training_stop |= not self._left
        return torch.zeros((), device=self.args.device, requires_grad=True)

    def _outputs(self, model: nn.Module, batch: dict[str, Any], numbers: Tensor) -> Any:
        given = {str(key): value for key, value in Signature.of(self.model.backbone, {}).inputs(batch).items()}
        return model(**given, deltas=[self.jobs[self._names[number]] for number in numbers.tolist()])

    def _stand_in(self, model: nn.Module, inputs: dict[str, Any]) -> Any:
        """Return the outputs of one row, of which nothing is learned: the other processes wait for this one."""
        count = len(inputs[COLUMN])
        row = picked({key: value for key, value in inputs.items() if key != COLUMN}, slice(0, 1), count)
        clean = {k: v.zero_() if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in row.items()}
        return self._outputs(model, clean, inputs[COLUMN].new_tensor([self._names.index(self._left[0])]))

    def _shares(self, outputs: Any, batch: dict[str, Any], numbers: Tensor) -> dict[str, Share]:
        """Return what each job has in a batch."""
        found = {}
        for number in torch.unique(numbers).tolist():
            rows = (numbers == number).nonzero().flatten()
            own = picked(outputs, rows, len(numbers)), picked(batch, rows, len(numbers))
            found[self._names[number]] = Share.of(self._losses[number], *own, len(rows))
        return found

    def _clip_grad_norm(self, model: nn.Module) -> Tensor:
        """Clip the gradient of each job; return the largest norm."""
        norms = [torch.zeros((), device=self.args.device)]
        for name in self._left:
            own = list(self.model.trainable_parameters(*self.jobs[name]))
            norm = unsharded(self.accelerator.clip_grad_norm_(own, self.args.max_grad_norm))
            if isfinite(norm):
                norms.append(norm.detach())
            else:
                self._diverge(name, float(norm))
        return torch.stack(norms).max()

    def create_optimizer(self, model: nn.Module | None = None) -> Any:
        """Make the optimizer that the arguments name, of the groups of the jobs' deltas."""
        if self.optimizer is None:
            kind, options = self.get_optimizer_cls_and_kwargs(self.args, self.model)
            groups = self.model.parameter_groups(*(delta for name in self.jobs for delta in self._own(name)))
            for group in groups:
                group.setdefault("weight_decay", self.args.weight_decay)
            self.optimizer = kind(groups, **options)
            self.optimizer.register_step_pre_hook(lambda *_: self._leave_out_absent())
        return self.optimizer

    def _leave_out_absent(self) -> None:
        """Let no step be taken by jobs without rows in it: shards have gradients of nothing."""
        if self._present is not None:  # else torch makes an optimizer's state, to be read into
            for name in self.jobs.keys() - self._present:
                for parameter in self.model.trainable_parameters(*self.jobs[name]):
                    parameter.grad = None
        self._present = None

    # Logs and evaluations

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Log, with the mean loss of each job since the last time."""
        if "loss" in logs:
            logs |= {f"loss_{name}": means.of(name)["loss"] for name, means in self._means.items()}
            self._means = {}
        super().log(logs, *args, **kwargs)

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Evaluate each job on its own examples; `eval_loss` is the mean of the jobs'."""
        data = self.eval_dataset if eval_dataset is None else eval_dataset
        if isinstance(data, dict) or data is None:
            return dict(super().evaluate(eval_dataset, ignore_keys, metric_key_prefix))
        found: dict[str, float] = {}
        with self._announced_once():
            parts = by_job(self.eval_dataset[data] if isinstance(data, str) else data)
            for name, part in parts.items():
                found |= super().evaluate(part, ignore_keys, f"{metric_key_prefix}_{name}")
        losses = [found[f"{metric_key_prefix}_{name}_loss"] for name in parts]
        found[f"{metric_key_prefix}_loss"] = mean = sum(losses) / len(losses)
        self.log({f"{metric_key_prefix}_loss": mean})
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, found)
        return found

    @contextmanager
    def _announced_once(self) -> Iterator[None]:
        """Tell callbacks of no part of an evaluation: they look for what is known of all of it."""
        handler: Any = self.callback_handler
        handler.on_evaluate = lambda args, state, control, metrics: control
        try:
            yield
        finally:
            del handler.on_evaluate

    def _evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        metrics: dict[str, float] = super()._evaluate(*args, **kwargs)
        in_parts(self.model)
        for name in [name for name in self._left if name in self._courses]:
            value = measure_of(name, self._best, metrics, f"eval_{name}_")
            if self._courses[name].measured(value, self.state.global_step):
                self.stopped[name] = self.state.global_step
                self._courses[name].put_back()
                self.log({f"stopped_{name}": value})
        self.control.should_training_stop |= not self._left
        return metrics

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        if COLUMN not in self._signature_columns:
            self._signature_columns += [COLUMN]

    # Checkpoints

    def _held(self, model: Any) -> list[Held]:
        return held_in(model)  # attached or not: rows are under them

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        courses = {name: course.state_dict() for name, course in self._courses.items()}
        if self.args.should_save:
            content = {"diverged": self.diverged, "stopped": self.stopped, "courses": courses}
            torch.save(content, Path(output_dir) / STATES)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None and (path := Path(checkpoint) / STATES).exists():
            content = torch.load(path, map_location="cpu", weights_only=True)
            self.diverged, self.stopped = content["diverged"], content["stopped"]
            for name in self._courses.keys() & content["courses"].keys():
                self._courses[name].load_state_dict(content["courses"][name])

    def _build_accelerator_args(self, **kwargs: Any) -> dict[str, Any]:
        if self.args.ddp_find_unused_parameters is None:  # a batch need not have rows of all jobs
            self.args.ddp_find_unused_parameters = True
        return dict(super()._build_accelerator_args(**kwargs))
