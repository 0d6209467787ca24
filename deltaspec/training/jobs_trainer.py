"""transformers' Trainer for many jobs on one backbone: each example says which job it is of.

>>> rows = [{"job": "french", "input_ids": [5, 7], "labels": 1}, …]
>>> trainer = JobsTrainer(model=c, args=args, train_dataset=rows)
>>> trainer.train(resume_from_checkpoint=True)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from math import isfinite
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from transformers import Trainer

from deltaspec.compiler.compiled import CompiledModel
from deltaspec.compiler.standard_verbs import written_elsewhere
from deltaspec.diagnostics.findings import DeltaSpecError, Diagnostic
from deltaspec.diagnostics.wording import closest_delta, show_value
from deltaspec.training.losses import Loss, usual_loss
from deltaspec.training.mixing import Signature, picked
from deltaspec.training.results import Means
from deltaspec.training.schedules import factor
from deltaspec.training.standing import refusals, trained_of

COLUMN = "job"
"""Column of a data set that says which job an example is of."""


class JobsTrainer(Trainer):
    """A Trainer whose batches have rows of several jobs, each under its own deltas and learning of its own rows.

    `model` is what `deltaspec.compile` returns. `jobs` are the jobs by name, each with its deltas, those that it stands
    on (frozen, derived, of a library) included; left out, each delta that is not frozen is a job. Each example has the
    name of its job under "job". The loss of a batch is the sum of the jobs', each the mean over its own rows: the
    model's usual one of `labels`, or `job_loss(outputs, batch)`, or one a job by name.

    Learning rates and schedules are those of the specs (`train:`), else of the arguments; gradients are clipped job by
    job. Logs and evaluations have each job's own numbers (`loss_french`, `eval_french_loss`, `eval_french_accuracy`).
    Checkpoints hold the deltas as `c.save` writes them. A job whose loss is not finite ends, and the others go on.
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
        self.loss_is_scaled_for_ga = False
        self._names = list(self.jobs)
        self._losses = self._chosen(job_loss)
        self._means: dict[str, Means] = {}
        self.data_collator = WithJobs(self.data_collator, self._names)

    def _chosen(self, given: Loss | Mapping[str, Loss] | None) -> list[Loss]:
        """Return the loss of each job. Raises DeltaSpecError (DS384) where one has none."""
        by_name = given if isinstance(given, Mapping) else dict.fromkeys(self._names, given)
        usual, found, findings = usual_loss(self.model.backbone), list[Loss](), list[Diagnostic]()
        for name in self._names:
            loss = by_name.get(name) or usual
            if loss is None:
                message = f"the job {name!r} has no loss, and a {type(self.model.backbone).__name__} has no usual one"
                findings.append(Diagnostic("DS384", message, "<jobs>", suggestion="give one: job_loss=…"))
            else:
                found.append(loss)
        if findings:
            raise DeltaSpecError(findings)
        return found

    # Learning

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Return the sum of the jobs' losses, each the mean over its rows, and the outputs.

        Raises DeltaSpecError (DS387) once no job is left.
        """
        numbers: Tensor = inputs[COLUMN]
        batch = {key: value for key, value in inputs.items() if key != COLUMN}
        training = self.model.training
        while True:
            if training and self.diverged:
                gone = torch.tensor([self._names.index(name) for name in self.diverged], device=numbers.device)
                kept = (~torch.isin(numbers, gone)).nonzero().flatten()
                batch, numbers = picked(batch, kept, len(numbers)), numbers[kept]
            if not len(numbers):
                return self._nothing()
            outputs = self._outputs(model, batch, numbers)
            losses = self._each(outputs, batch, numbers)
            values = {name: float(loss.detach()) for name, (loss, _) in losses.items()}
            failed = [name for name, value in values.items() if not isfinite(value)]
            if not training or not failed:
                break
            for name in failed:  # the batch is run again without its rows: not a number spreads
                self._diverge(name, values[name])
        for name, (_, rows) in losses.items() if training else ():
            self._means.setdefault(name, Means()).add({"loss": values[name]}, rows)
        total = torch.stack([loss for loss, _ in losses.values()]).sum()
        return (total, outputs) if return_outputs else total

    def _diverge(self, name: str, value: float) -> None:
        """End a job whose loss, or the norm of whose gradient, is not finite."""
        self.diverged[name] = self.state.global_step + 1
        for parameter in self.model.trainable_parameters(*self.jobs[name]):
            parameter.grad = None
        self.log({f"diverged_{name}": value})

    def _nothing(self) -> Tensor:
        """Return a loss that nothing is learned of: the batch had only rows of jobs that diverged."""
        left = [delta for name, own in self.jobs.items() if name not in self.diverged for delta in own]
        if not left:
            message = f"the losses of all jobs are not finite: {', '.join(self.diverged)}"
            raise DeltaSpecError([Diagnostic("DS387", message, "<jobs>", suggestion="take lower learning rates")])
        return sum((p.sum() * 0 for p in self.model.trainable_parameters(*left)), torch.zeros(()))

    def _outputs(self, model: nn.Module, batch: dict[str, Any], numbers: Tensor) -> Any:
        given = {str(key): value for key, value in Signature.of(self.model.backbone, {}).inputs(batch).items()}
        return model(**given, deltas=[self.jobs[self._names[number]] for number in numbers.tolist()])

    def _each(self, outputs: Any, batch: dict[str, Any], numbers: Tensor) -> dict[str, tuple[Tensor, int]]:
        """Return the loss of each job in a batch, and its number of rows."""
        found = {}
        for number in torch.unique(numbers).tolist():
            rows = (numbers == number).nonzero().flatten()
            own = picked(outputs, rows, len(numbers)), picked(batch, rows, len(numbers))
            found[self._names[number]] = self._losses[number](*own), len(rows)
        return found

    def _clip_grad_norm(self, model: nn.Module) -> Tensor:
        """Clip the gradient of each job; return the largest norm."""
        norms = [torch.zeros((), device=self.args.device)]
        for name, own in [job for job in self.jobs.items() if job[0] not in self.diverged]:
            norm = self.accelerator.clip_grad_norm_(self.model.trainable_parameters(*own), self.args.max_grad_norm)
            if isfinite(norm):
                norms.append(norm.detach())
            else:
                self._diverge(name, float(norm))
        return torch.stack(norms).max()

    def create_optimizer(self, model: nn.Module | None = None) -> Any:
        """Make the optimizer that the arguments name, of the groups of the jobs' deltas."""
        if self.optimizer is None:
            kind, options = self.get_optimizer_cls_and_kwargs(self.args, self.model)
            groups = self.model.parameter_groups(
                *(delta for own in self.jobs.values() for delta in trained_of(self.model, own))
            )
            for group in groups:
                group.setdefault("weight_decay", self.args.weight_decay)
            self.optimizer = kind(groups, **options)
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """Make the scheduler of the arguments; groups with hints have their own."""
        if self.lr_scheduler is not None:
            return self.lr_scheduler
        optimizer = self.optimizer if optimizer is None else optimizer
        usual = super().create_scheduler(num_training_steps, optimizer)
        hinted = [group.keys() & {"schedule", "warmup"} for group in optimizer.param_groups]
        if any(hinted):
            if not isinstance(usual, LambdaLR):
                kind = self.args.lr_scheduler_type
                raise ValueError(f"lr_scheduler_type={kind} does not go with the hints of the specs: give one of them")
            groups = zip(optimizer.param_groups, hinted, usual.lr_lambdas, strict=True)
            own: list[Callable[[int], float]] = [
                factor(group, num_training_steps) if hints else other for group, hints, other in groups
            ]
            self.lr_scheduler = LambdaLR(optimizer, own)
        return self.lr_scheduler

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
        if isinstance(data, dict) or metric_key_prefix != "eval" or data is None:
            return dict(super().evaluate(eval_dataset, ignore_keys, metric_key_prefix))
        own: dict[str, list[int]] = {}
        for number in range(len(data)):
            own.setdefault(data[number][COLUMN], []).append(number)
        parts = {name: _chosen_rows(data, rows) for name, rows in own.items()}
        found = dict(super().evaluate(parts, ignore_keys, metric_key_prefix))
        losses = [found[f"eval_{name}_loss"] for name in own if f"eval_{name}_loss" in found]
        if losses:
            found["eval_loss"] = sum(losses) / len(losses)
            self.log({"eval_loss": found["eval_loss"]})
        return found

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        if COLUMN not in self._signature_columns:
            self._signature_columns += [COLUMN]

    # Checkpoints

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        if not self.args.should_save:
            return
        folder = Path(self.args.output_dir if output_dir is None else output_dir)
        with written_elsewhere():
            super()._save(str(folder), state_dict={})
        (folder / "model.safetensors").unlink(missing_ok=True)  # of a model that cannot save itself: with nothing in it
        self.model.save(folder)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        self.model.load(resume_from_checkpoint)

    def _load_best_model(self) -> None:
        self.model.load(self.state.best_model_checkpoint)


class WithJobs:
    """A collator that lets another one make a batch, and adds the number of each example's job."""

    def __init__(self, collate: Any, names: Sequence[str]) -> None:
        self.collate, self.numbers = collate, {name: number for number, name in enumerate(names)}

    def __call__(self, features: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Make a batch. Raises DeltaSpecError (DS386) for examples of no job."""
        names: list[Any] = [feature.get(COLUMN) for feature in features]
        if unknown := [name for name in dict.fromkeys(names) if name not in self.numbers]:
            raise DeltaSpecError([self._unknown(name) for name in unknown])
        batch = self.collate([{key: value for key, value in each.items() if key != COLUMN} for each in features])
        return {**batch, COLUMN: torch.tensor([self.numbers[name] for name in names])}

    def _unknown(self, name: Any) -> Diagnostic:
        message = f'an example has no "{COLUMN}"' if name is None else f"an example is of the job {show_value(name)}"
        near = closest_delta(str(name), self.numbers)
        hint = f"did you mean {near!r}?" if near and name is not None else f"jobs are: {', '.join(self.numbers)}"
        return Diagnostic("DS386", message, "<jobs>", suggestion=hint)

    def __getattr__(self, name: str) -> Any:
        if name == "collate":  # not there yet: this is being unpickled
            raise AttributeError(name)
        return getattr(self.collate, name)


def _chosen_rows(data: Any, rows: list[int]) -> Any:
    """Return some rows of a data set."""
    return data.select(rows) if hasattr(data, "select") else torch.utils.data.Subset(data, rows)
