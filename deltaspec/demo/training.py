"""Training, evaluation and the linear probe of the demo, in plain torch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedTokenizerBase

from deltaspec.demo.data import Split, Task
from deltaspec.demo.model import encode

EPOCHS, BATCH_SIZE, EVAL_BATCH_SIZE = 3, 32, 64
BODY_RATE, HEAD_RATE = 2e-3, 5e-3
PROBE_PENALTY = 0.5


def fit(
    model: nn.Module,
    body: Iterable[nn.Parameter],
    head: Iterable[nn.Parameter],
    task: Task,
    tokens: PreTrainedTokenizerBase,
    progress: Progress,
) -> None:
    """Train one delta and its head on a task with AdamW and a linear decay; leaves the model in eval mode."""
    steps = EPOCHS * -(-len(task.train.texts) // BATCH_SIZE)
    optimizer = torch.optim.AdamW([{"params": [*body], "lr": BODY_RATE}, {"params": [*head], "lr": HEAD_RATE}])
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
    shown = progress.add_task(f"train {task.name}", total=steps, loss=float("nan"), accuracy=0.0)
    torch.manual_seed(0)
    model.train()
    for epoch in range(EPOCHS):
        order = _similar_lengths_together(task.train, torch.randperm(len(task.train.texts)).tolist())
        right, seen, total = 0, 0, 0.0
        for texts, labels in _batches(task.train, order, BATCH_SIZE):
            logits = model(**encode(tokens, texts))[task.name]
            loss = F.cross_entropy(logits, labels)
            optimizer.zero_grad()
            torch.autograd.backward(loss)
            optimizer.step()
            schedule.step()
            right, seen = right + int((logits.argmax(dim=1) == labels).sum()), seen + len(labels)
            total += loss.item() * len(labels)
            progress.update(shown, advance=1, loss=total / seen, accuracy=right / seen)
        progress.console.print(
            f"{task.name}, epoch {epoch + 1} of {EPOCHS}: loss {total / seen:.3f}, accuracy {right / seen:.3f}",
            highlight=False,
        )
    model.eval()


def training_progress(console: Any) -> Progress:
    """Make the progress display: steps, loss, accuracy of the running epoch, time left."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]:.3f}  accuracy {task.fields[accuracy]:.3f}  left"),
        TimeRemainingColumn(),
    )
    return Progress(*columns, console=console)


def _similar_lengths_together(split: Split, order: Sequence[int]) -> list[int]:
    """Sort a random order by length within windows of some batches: less padding, so faster, and still random."""
    window = 8 * BATCH_SIZE
    windows = (order[start : start + window] for start in range(0, len(order), window))
    return [i for chosen in windows for i in sorted(chosen, key=lambda i: len(split.texts[i]))]


def _batches(split: Split, order: Sequence[int], size: int) -> Iterator[tuple[list[str], Tensor]]:
    """Return texts and labels `[batch]` in the given order."""
    for start in range(0, len(order), size):
        chosen = order[start : start + size]
        yield [split.texts[i] for i in chosen], torch.tensor([split.labels[i] for i in chosen])


@torch.no_grad()
def outputs(compute: Callable[..., Tensor], split: Split, tokens: PreTrainedTokenizerBase) -> Tensor:
    """Run `compute(input_ids, attention_mask)` over all texts, in their order: `[texts, width]`."""
    by_length = sorted(range(len(split.texts)), key=lambda i: len(split.texts[i]))  # little padding, so faster
    rows = torch.cat([compute(**encode(tokens, texts)) for texts, _ in _batches(split, by_length, EVAL_BATCH_SIZE)])
    return rows[torch.tensor(by_length).argsort()]


def accuracy(logits: Tensor, split: Split) -> float:
    """Compute the share of texts whose highest logit is their label's."""
    return (logits.argmax(dim=1) == torch.tensor(split.labels)).float().mean().item()


def linear_probe(features: Tensor, split: Split, classes: int) -> nn.Linear:
    """Fit a logistic regression (L2 penalty, L-BFGS) on frozen features `[texts, width]`."""
    x, labels = features.double(), torch.tensor(split.labels)
    probe = nn.Linear(x.shape[1], classes, dtype=torch.float64)
    nn.init.zeros_(probe.weight)
    nn.init.zeros_(probe.bias)
    optimizer = torch.optim.LBFGS(probe.parameters(), max_iter=500, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(probe(x), labels, reduction="sum") + PROBE_PENALTY * probe.weight.square().sum()
        torch.autograd.backward(loss)
        return loss

    optimizer.step(closure)  # type: ignore[no-untyped-call]
    return probe.to(features.dtype)
