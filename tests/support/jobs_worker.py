"""What each of two processes does that trains several jobs: with JobsTrainer and Training, under DDP and in shards."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, distributed
from torch.distributed.fsdp import fully_shard
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import SequentialSampler
from trained import LORA, arguments, llama
from transformers import TrainingArguments

import deltaspec
from deltaspec.diagnostics.findings import DeltaSpecError
from deltaspec.training import Job, JobsTrainer, Training

SPEC = {"deltaspec": 1, "deltas": [{**LORA, "name": name, "attached": False} for name in "abc"]}
BAD = 3
"""A token that makes the loss of the job `c` not a number."""
ORDER = "aabb accc  aaaa bbbc  abca bbCc  aabb cccc".replace(" ", "")
"""The jobs of rows; each process has four in turn. In the third step `c` diverges, and then one has no other rows."""
IDS = torch.randint(4, 60, (len(ORDER), 6), generator=torch.Generator().manual_seed(6))
WAYS = ("ddp", "root", "layers")


def build() -> Any:
    return deltaspec.compile(llama(), SPEC)


def tensors(compiled: Any) -> list[Tensor]:
    """Return the tensors of all deltas, whole."""
    found = (tensor.detach() for delta in compiled.deltas.values() for _, tensor in delta.tensors())
    return [getattr(tensor, "full_tensor", tensor.clone)() for tensor in found]


def _rows() -> list[dict[str, Any]]:
    found = []
    for number, job in enumerate(ORDER):
        ids, labels = IDS[number].clone(), IDS[number].clone()
        ids[0] = BAD if job == "C" else ids[0]
        labels[: number % 4 if job == "a" else 0] = -100  # means over as many labels as each process has
        found.append({"job": job.lower(), "input_ids": ids, "labels": labels})
    return found


def _bad(outputs: Any, batch: Any) -> Tensor:
    loss = F.cross_entropy(outputs.logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten())
    return loss * (float("nan") if (batch["input_ids"] == BAD).any() else 1)


class InOrder(JobsTrainer):
    def _get_train_sampler(self, *args: Any) -> Any:
        return SequentialSampler(self.train_dataset)


def with_trainer(folder: Path, rows: int, **options: Any) -> dict[str, Any]:
    """Train with JobsTrainer, so many rows a process; what it found, and what it found once resumed."""
    given = arguments(
        folder, max_steps=5, per_device_train_batch_size=rows, eval_strategy="steps", eval_steps=1, **options
    )
    given |= {"save_steps": 2, "learning_rate": 0.1}
    settings: dict[str, Any] = {"job_loss": {"c": _bad}, "patience": {"b": 1}, "train_dataset": _rows()}
    evaluated = [{**row, "labels": row["labels"].flip(0)} for row in _rows()[:4]]
    found: dict[str, Any] = {}
    for name, resume in (("whole", None), ("resumed", str(folder / "checkpoint-4"))):
        compiled = build()
        trainer = InOrder(model=compiled, args=TrainingArguments(**given), eval_dataset=evaluated, **settings)
        trainer.train(resume_from_checkpoint=resume)
        logs = [value for entry in trainer.state.log_history for key, value in sorted(entry.items()) if "loss_" in key]
        found[name] = {"ended": (trainer.diverged, trainer.stopped), "tensors": tensors(compiled), "losses": logs}
    return found


def with_training(call: Any, folder: Path, rank: int | None) -> dict[str, Any]:
    """Train with Training, each process with half of each batch; save, and go on from there."""
    part = slice(0, 8) if rank is None else slice(4 * rank, 4 * rank + 4)
    labels = IDS[:8].clone()
    labels[0, :4] = labels[6, 2:] = -100
    data = [
        {"input_ids": IDS[:8][part], "labels": labels[part]},
        {"input_ids": IDS[8:16][part], "labels": IDS[8:16][part]},
    ]
    bad = [{"input_ids": IDS[:8].where(torch.arange(8)[:, None] < 7, BAD)[part], "labels": IDS[:8][part]}]

    def training(call: Any) -> Training:
        jobs = [
            Job("a", data=data, steps=4, evaluation=data[1:], patience=1, max_norm=0.3),
            Job("b", data=data, steps=2, accumulate=2),
            Job("c", data=[*data[1:], *bad], steps=3, loss=_bad),
        ]  # fmt: skip
        return Training(call, jobs, optimizer=lambda groups: torch.optim.AdamW(groups, lr=0.05))

    first = training(call)
    results = first.run(evaluate_every=1, checkpoint=folder, progress=False)
    compiled = first.model
    saved = tensors(compiled)
    with torch.no_grad():
        for parameter in compiled.trainable_parameters("a", "b", "c"):
            parameter.zero_()
    training(call).load(folder)
    return {
        "tensors": saved,
        "loaded": tensors(compiled),
        "jobs": [(result.name, result.status, result.losses) for result in results],
    }


def sharded(way: str) -> Any:
    """Return a model that processes train together."""
    compiled = build()
    if way == "ddp":
        return DistributedDataParallel(compiled, find_unused_parameters=True)
    for layer in compiled.backbone.model.layers if way == "layers" else ():
        fully_shard(layer, mesh=distributed.init_device_mesh("cpu", (2,)))
    return fully_shard(compiled, mesh=distributed.init_device_mesh("cpu", (2,)))


def refused(rank: int) -> list[str]:
    """Return what jobs are refused with that processes would wait for."""
    found = []
    data = [{"input_ids": IDS[:2], "labels": IDS[:2]}]
    for call, count in (
        (DistributedDataParallel(build()), 1),
        (DistributedDataParallel(build(), find_unused_parameters=True), 1 + rank),
    ):
        with pytest.raises(DeltaSpecError) as error:
            Training(call, [Job("a", data=data * count)])
        found.append(str(error.value))
    return found
