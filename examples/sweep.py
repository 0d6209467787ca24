"""A sweep of nine jobs, three ranks by three learning rates, in one pass; beside PEFT, which takes nine runs.

The backbone is a pretrained MiniLM-L6, the task is who wrote a tweet, and each job has a head of its own:
examples/specs/sweep.deltaspec.yaml. `make sweep`, or `python examples/sweep.py --help`.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import click
import torch
from peft import LoraConfig, get_peft_model
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader
from transformers import AutoModel
from transformers.utils import logging

import deltaspec
from deltaspec.demo import data
from deltaspec.demo.model import MAX_TOKENS, SentenceClassifier, tokenizer
from deltaspec.planning.planned import PlannedDelta
from deltaspec.training import Job, Training, scheduler
from deltaspec.training.batches import Stream

SPEC = Path(__file__).parent / "specs/sweep.deltaspec.yaml"
Batch = dict[str, Tensor]


@dataclass(frozen=True, slots=True)
class Settings:
    """How much to do."""

    train: int = 600
    test: int = 300
    epochs: int = 2
    batch: int = 8


QUICK = Settings(train=32, test=32, epochs=1)


def backbone() -> SentenceClassifier:
    """Load the pretrained encoder, with one fresh head: the same one each time."""
    encoder = AutoModel.from_pretrained(data.weights_dir())
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(0)
        return SentenceClassifier(encoder, {"task": 2}).eval()


def batches(split: data.Split, size: int, *, shuffle: bool) -> DataLoader[Batch]:
    """Return a loader of tokenised batches; those of a test are sorted by length, which saves padding."""
    encoded = tokenizer()(list(split.texts), truncation=True, max_length=MAX_TOKENS)["input_ids"]
    rows = list(zip(encoded, split.labels, strict=True))
    if not shuffle:
        rows.sort(key=lambda row: len(row[0]))
    return DataLoader(rows, size, shuffle=shuffle, collate_fn=collate)  # type: ignore[arg-type]


def collate(rows: Sequence[tuple[list[int], int]]) -> Batch:
    """Pad a batch to its longest text."""
    ids = nn.utils.rnn.pad_sequence([torch.tensor(tokens) for tokens, _ in rows], batch_first=True)
    mask = nn.utils.rnn.pad_sequence([torch.ones(len(tokens), dtype=torch.long) for tokens, _ in rows], True)
    return {"input_ids": ids, "attention_mask": mask, "labels": torch.tensor([label for _, label in rows])}


def cross_entropy(outputs: dict[str, Tensor], batch: Batch) -> Tensor:
    """Return the mean loss of a job's rows."""
    return F.cross_entropy(outputs["task"], batch["labels"])


def accuracy(outputs: dict[str, Tensor], batch: Batch) -> dict[str, float]:
    """Return how many of a job's rows are right."""
    return {"accuracy": (outputs["task"].argmax(dim=1) == batch["labels"]).float().mean().item()}


def together(task: data.Task, settings: Settings, output: Path, console: Console) -> dict[str, float]:
    """Train all jobs in one pass: the best accuracy of each."""
    c = deltaspec.compile(backbone(), SPEC)
    jobs = Job.each(
        c,
        "tweets",
        "head",
        data=batches(task.train, settings.batch, shuffle=True),
        evaluation=batches(task.test, 4 * settings.batch, shuffle=False),
        loss=cross_entropy,
        metrics=accuracy,
        best="accuracy",
        epochs=settings.epochs,
    )
    every = -(-jobs[0].total() // settings.epochs)
    results = Training(c, jobs).run(evaluate_every=every, checkpoint=output / "checkpoint", progress=console)
    results.plot(output / "curves.png")
    results.save(output / "results.csv")
    c.save(output / "deltas")
    return {result.name: result.best["accuracy"] for result in results}


def alone(delta: PlannedDelta, task: data.Task, settings: Settings) -> float:
    """Train one job with PEFT: its best accuracy."""
    rank, rate = delta.matrix["rank"], delta.matrix["train.lr"]
    config = LoraConfig(r=rank, lora_alpha=16, target_modules=["query", "value"], modules_to_save=["heads.task"])
    torch.manual_seed(0)
    model = get_peft_model(backbone(), config)  # type: ignore[arg-type]
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    body = [p for name, p in named if "lora_" in name]
    head = [p for name, p in named if "lora_" not in name]
    optimizer = torch.optim.AdamW(
        [
            {"params": body, "lr": rate, "weight_decay": 0.01, "schedule": "linear", "warmup": 0.1},
            {"params": head, "lr": 5e-3},
        ]
    )
    loader, best = batches(task.train, settings.batch, shuffle=True), 0.0
    test = batches(task.test, 4 * settings.batch, shuffle=False)
    stream, schedule = Stream("peft", loader, 0), scheduler(optimizer, settings.epochs * len(loader))
    for _ in range(settings.epochs):
        model.train()
        for _ in range(len(loader)):
            batch = stream.next()
            loss = cross_entropy(model(batch["input_ids"], batch["attention_mask"]), batch)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        best = max(best, tested(model, test))
    return best


@torch.no_grad()
def tested(model: nn.Module, test: DataLoader[Batch]) -> float:
    """Return the accuracy of a model on test batches."""
    model.eval()
    right = rows = 0.0
    for batch in test:
        found = accuracy(model(batch["input_ids"], batch["attention_mask"]), batch)["accuracy"]
        right, rows = right + found * len(batch["labels"]), rows + len(batch["labels"])
    return right / rows


def run(console: Console, output: Path, settings: Settings, beside_peft: bool) -> None:
    """Train all jobs in one pass, then each with PEFT, and print times and accuracies."""
    task = data.tweets().cut(settings.train, settings.test)
    output.mkdir(parents=True, exist_ok=True)
    plan = deltaspec.plan(backbone(), SPEC)
    deltas = [delta for delta in plan.deltas if delta.name.startswith("tweets")]
    table = Table("job", title=f"{len(deltas)} jobs of {settings.epochs} × {len(task.train.texts)} tweets")
    start = time.perf_counter()
    ours = together(task, settings, output, console)
    seconds = {"one pass": time.perf_counter() - start}
    theirs: dict[str, float] = {}
    start = time.perf_counter()
    for delta in deltas if beside_peft else ():
        theirs[delta.name] = alone(delta, task, settings)
        console.print(f"PEFT, {delta.name}: {theirs[delta.name]:.3f}", markup=False, highlight=False)
    seconds["PEFT, one by one"] = time.perf_counter() - start
    for title in ("one pass", *(("PEFT, one by one",) if theirs else ())):
        table.add_column(title, justify="right")
    for name, score in ours.items():
        table.add_row(name.replace("[", "\\["), f"{score:.3f}", *([f"{theirs[name]:.3f}"] if theirs else []))
    table.add_section()
    table.add_row("best", f"{max(ours.values()):.3f}", *([f"{max(theirs.values()):.3f}"] if theirs else []))
    table.add_row("seconds", f"{seconds['one pass']:.0f}", *([f"{seconds['PEFT, one by one']:.0f}"] if theirs else []))
    console.print(table)
    if theirs:
        ratio = seconds["PEFT, one by one"] / seconds["one pass"]
        console.print(f"PEFT's nine runs take {ratio:.2f} × the time of the one pass.", highlight=False)
    console.print(f"curves, results, deltas and a checkpoint: {output}", highlight=False)


@click.command()
@click.option("--output", default="example-output/sweep", type=click.Path(path_type=Path), help="Where files go.")
@click.option("--quick", is_flag=True, help="A handful of texts: every part runs, the figures mean little.")
@click.option("--peft/--no-peft", "beside_peft", default=True, help="Whether PEFT trains the same jobs, too.")
def main(output: Path, quick: bool, beside_peft: bool) -> None:
    """Sweep ranks and learning rates in one pass, beside PEFT."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        run(Console(), output, QUICK if quick else Settings(), beside_peft)
    except data.MissingPackage as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
