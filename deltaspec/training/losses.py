"""The loss of a job's rows where it names none: what transformers' models compute of `labels`."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from deltaspec.diagnostics.findings import DeltaSpecError, Diagnostic
from deltaspec.training.job_rows import unknown_jobs

Loss = Callable[[Any, Any], Tensor]
"""From a job's outputs and its batch to the mean loss of its rows."""
_CLASSES = ("ForSequenceClassification", "ForImageClassification", "ForVideoClassification", "ForAudioClassification")
_IGNORED = -100


@dataclass(frozen=True)
class UsualLoss:
    """A loss of logits and `labels`."""

    compute: Callable[[Tensor, Tensor], Tensor]
    shifted: bool = False
    """Whether each token is predicted from those before it, so that the first one is not."""

    def __call__(self, outputs: Any, batch: Any) -> Tensor:
        """Return the loss of a job's rows. Raises DeltaSpecError (DS384) where it has no logits or labels."""
        labels = batch.get("labels") if isinstance(batch, Mapping) else batch
        logits = getattr(outputs, "logits", None)
        if not isinstance(labels, Tensor) or not isinstance(logits, Tensor):
            lacks = "its outputs have no logits" if isinstance(labels, Tensor) else "its batches have no labels"
            message, hint = f"there is no loss for a job: {lacks}", "give it one: Job(…, loss=lambda outputs, batch: …)"
            raise DeltaSpecError([Diagnostic("DS384", message, "<jobs>", suggestion=hint)])
        wide = logits if logits.element_size() > 2 else logits.float()
        return self.compute(wide, labels.to(logits.device))

    def items(self, batch: Any) -> int:
        """Return how many labels it is the mean over."""
        labels: Tensor = batch["labels"] if isinstance(batch, Mapping) else batch
        return int((labels[:, 1:] if self.shifted else labels).ne(_IGNORED).sum())


def items_of(loss: Loss, batch: Any, rows: int) -> int:
    """Return how many items a loss is the mean over: labels, or rows where it is a job's own."""
    return loss.items(batch) if isinstance(loss, UsualLoss) else rows


def usual_loss(model: nn.Module) -> Loss | None:
    """Return the loss that a model of transformers computes itself, of `labels`; None where it has no usual one."""
    kind, config = getattr(model, "loss_type", None) or _language(model), getattr(model, "config", None)
    if getattr(config, "output_router_logits", False):
        return _with_routers
    if kind in _CLASSES:
        return UsualLoss(lambda logits, labels: _of_classes(logits, labels, getattr(config, "problem_type", None)))
    if kind in ("ForTokenClassification", "ForMaskedLM"):
        return UsualLoss(_of_tokens)
    if kind in ("ForCausalLM", "ForConditionalGeneration"):
        if getattr(config, "is_encoder_decoder", False):
            return UsualLoss(_of_tokens)
        return UsualLoss(lambda logits, labels: _of_tokens(logits[:, :-1], labels[:, 1:]), shifted=True)
    return None


def losses_of(model: nn.Module, jobs: Sequence[str], given: Loss | Mapping[str, Loss] | None) -> list[Loss]:
    """Return the loss of each job: one for all, or by name, else the usual one.

    Raise DeltaSpecError where a job has none (DS384), or one is given that is not there (DS382).
    """
    by_name = given if isinstance(given, Mapping) else dict.fromkeys(jobs, given)
    usual, found, findings = usual_loss(model), list[Loss](), unknown_jobs("job_loss", by_name, jobs)
    for name in jobs:
        loss = by_name.get(name) or usual
        if loss is None:
            findings.append(without_loss(name, model, "job_loss=…"))
        else:
            found.append(loss)
    if findings:
        raise DeltaSpecError(findings)
    return found


def without_loss(job: str, model: nn.Module, way_out: str) -> Diagnostic:
    """Return the finding (DS384) that a job has no loss."""
    message = f"the job {job!r} has no loss, and a {type(model).__name__} has no usual one"
    return Diagnostic("DS384", message, "<jobs>", suggestion=f"give it one: {way_out}")


def _language(model: nn.Module) -> str | None:
    """Return the sort of loss of a language model whose class does not say it, such as GPT2LMHeadModel."""
    if "transformers" not in sys.modules:
        return None
    from transformers.models.auto import modeling_auto as known

    name = type(model).__name__
    if name in known.MODEL_FOR_MASKED_LM_MAPPING_NAMES.values():
        return "ForMaskedLM"
    return "ForCausalLM" if name in known.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values() else None


def _with_routers(outputs: Any, batch: Any) -> Tensor:
    """Raise DeltaSpecError (DS384): the model adds a loss of its routers, which is one of all rows together."""
    message = "there is no loss for a job: the model's own has a part for its routers, of the rows of all jobs"
    hint = "set output_router_logits=False in its configuration, or give the job a loss: Job(…, loss=…)"
    raise DeltaSpecError([Diagnostic("DS384", message, "<jobs>", suggestion=hint)])


def _of_tokens(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, -2), labels.flatten(), ignore_index=_IGNORED)


def _of_classes(logits: Tensor, labels: Tensor, problem: str | None) -> Tensor:
    if problem == "regression" or (problem is None and logits.shape[-1] == 1):
        return F.mse_loss(logits.reshape(labels.shape), labels.to(logits.dtype))
    if problem == "multi_label_classification" or labels.is_floating_point():
        return F.binary_cross_entropy_with_logits(logits, labels)
    return F.cross_entropy(logits, labels.reshape(-1), ignore_index=_IGNORED)
