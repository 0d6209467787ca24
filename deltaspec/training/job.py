"""A job: what its rows are under, what they are, and how it is trained."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sized
from dataclasses import dataclass, field
from math import ceil
from typing import TYPE_CHECKING, Any

from deltaspec.diagnostics.findings import DeltaSpecError, Diagnostic, require_known
from deltaspec.training.losses import Loss
from deltaspec.training.standing import trained_of

if TYPE_CHECKING:
    from deltaspec.compiler.compiled import CompiledModel

Metrics = Callable[[Any, Any], Mapping[str, float]]
"""From outputs and batch to means over its rows, by name."""


@dataclass(kw_only=True)
class Job:
    """One of the jobs that train in one pass.

    `Job("french", data=batches)` trains one delta; `Job("french", "french-head", data=…)` those that its rows are under
    together; those of them that are frozen (`requires_grad_(False)`), derived or of a library are what it stands on,
    and any number of jobs may stand on one. `data` is what gives batches, anew each epoch: a DataLoader, or a list. A
    batch is a mapping, of which the model gets what its forward takes, labels apart, or (inputs, target). Jobs may
    share their data.
    """

    deltas: tuple[str, ...]
    data: Iterable[Any]
    name: str = ""
    """What it is called; left out, as the first delta that it trains."""
    loss: Loss | None = None
    """From the outputs of its rows and the batch (or the target) to their mean loss; left out, the model's own."""
    steps: int | None = None
    """Number of optimizer steps; left out, those of `epochs`."""
    epochs: int = 1
    accumulate: int = 1
    """Batches that make a step."""
    max_norm: float | None = None
    """Norm that the gradient of its parameters is clipped to."""
    seed: int | None = None
    """Seed of the order of its data; left out, the hint of its deltas (`train.seed`), else 0."""
    evaluation: Iterable[Any] | None = None
    """Batches that it is evaluated on."""
    metrics: Metrics | None = None
    """Measures of an evaluation beside the loss: means over the rows of a batch, by name."""
    best: str = "loss"
    """The measure by which one evaluation is better than another: the loss, of which less is better, or a metric."""
    patience: int | None = None
    """Evaluations without a better one after which it stops."""
    keep_best: bool = field(default=False)
    """Ends with the parameters of its best evaluation."""

    def __init__(self, *deltas: str, data: Iterable[Any], **options: Any) -> None:
        unknown = sorted(options.keys() - {*type(self).__dataclass_fields__} | (options.keys() & {"deltas"}))
        if unknown:
            raise TypeError(f"a job takes no {unknown[0]!r}")
        if not deltas or not all(isinstance(delta, str) for delta in deltas):
            raise TypeError("a job names the deltas that its rows are under: Job('french', data=…)")
        self.deltas, self.data = deltas, data
        for key, value in options.items():
            setattr(self, key, value)
        self.name = self.name or deltas[0]
        self.keep_best = options.get("keep_best", self.patience is not None)
        for key in ("steps", "epochs", "accumulate", "patience"):
            number = getattr(self, key)
            if number is not None and (not isinstance(number, int) or number < 1):
                raise ValueError(f"{key} of the job {self.name!r} is 1 or more, not {number!r}")
        if self.max_norm is not None and not self.max_norm > 0:
            raise ValueError(f"max_norm of the job {self.name!r} is greater than 0, not {self.max_norm!r}")
        if self.best != "loss" and self.metrics is None:
            raise ValueError(f"the job {self.name!r} is judged by {self.best!r}, and has no metrics=… that measure it")
        if self.evaluation is None and (self.patience is not None or self.keep_best):
            raise ValueError(f"the job {self.name!r} needs evaluation=… to know its best parameters")

    @classmethod
    def each(cls, c: CompiledModel, *entries: str, data: Iterable[Any], **options: Any) -> list[Job]:
        """Return a job for each delta of an entry with a matrix, or of all entries, alike but for their deltas.

        Of several entries with the same matrix (`head` with `matrix: french`), a job has one delta of each; one without
        a matrix that is frozen, derived or of a library is what all of them stand on. Raises UnknownDeltaError;
        ValueError for entries whose matrices differ.
        """
        trained = [delta.name for delta in c.plan.deltas if delta.derived is None]
        points: dict[str, list[str]] = {}
        for name in trained:
            points.setdefault(name.partition("[")[0], []).append(name.partition("[")[1] + name.partition("[")[2])
        if not entries:
            return [cls(name, data=data, **options) for name in trained]
        whole = {name: [""] for name in c.deltas}
        known = {**whole, **points}
        require_known(entries, known)
        many = [entry for entry in entries if known[entry] != [""] or trained_of(c, [entry])]
        for other in many[1:]:
            if known[other] != known[many[0]]:
                raise ValueError(f"{many[0]!r} and {other!r} have different matrices")
        listed = known[many[0]] if many else [""]
        each = ([f"{entry}{point}" if entry in many else entry for entry in entries] for point in listed)
        return [cls(*deltas, data=data, **options) for deltas in each]

    def total(self) -> int:
        """Return the number of its steps. Raises DeltaSpecError (DS382) where the data does not say how long it is."""
        if self.steps is not None:
            return self.steps
        if not isinstance(self.data, Sized):
            message = f"the job {self.name!r} has data without a length, so an epoch has no number of steps"
            raise DeltaSpecError([Diagnostic("DS382", message, "<jobs>", suggestion="give it steps=…")])
        return max(1, ceil(self.epochs * len(self.data) / self.accumulate))
