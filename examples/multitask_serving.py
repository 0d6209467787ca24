"""Three tasks on one backbone: three deltas, trained, and a stream of mixed requests, served in several ways.

The backbone is a pretrained MiniLM-L6 with one head; each task has a delta (LoRA, an adapter, IA3: examples/specs/) and
a head of its own. `make example`, or `python examples/multitask_serving.py --help`.
"""

from __future__ import annotations

import functools
import itertools
import random
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import click
import torch
from multitask_tasks import backbone, deltas, encode, newsgroups, spec, train
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from serving_queue import Request, Served, Way, oldest, pad, poisson, same_task, serve, weight_bytes
from torch import Tensor, nn
from transformers.utils import logging

import deltaspec
from deltaspec.demo import data, training


@dataclass(frozen=True, slots=True)
class Settings:
    """How much to do."""

    train: int = 600
    epochs: int = 2
    requests: int = 300
    batch: int = 16
    rounds: int = 3
    load: float = 0.8
    """Requests a second in the queue, as a share of what one by one can be served with switching."""
    clock: Callable[[], float] = time.perf_counter


QUICK = Settings(train=64, epochs=1, requests=60, rounds=1)


class Disagreement(RuntimeError):
    """The ways of serving do not give the same answers."""


def run(console: Console, output: Path, tasks: Sequence[data.Task], settings: Settings, together: bool) -> None:
    """Train what is not in `output` yet, serve, and print what came of it."""
    original = backbone()
    c = deltaspec.compile(original, *(spec(task.name) for task in tasks))
    texts = {task.name: encode(task, task.train.first(settings.train)) for task in tasks}
    requests = stream({task.name: encode(task, task.test) for task in tasks}, settings.requests)
    with training.training_progress(console) as progress:
        for task in tasks:
            folder = output / task.name
            if not folder.exists():
                one = deltaspec.compile(original, spec(task.name))
                started = settings.clock()
                train(one, {task.name: texts[task.name]}, settings.epochs, progress)
                took = settings.clock() - started
                console.print(f"{task.name}: {task.title} Trained by itself in {took:.0f} s.", highlight=False)
                one.save(folder)
            c.load(folder)
    console.print(f"Deltas are in {output}/; a directory that is there is not trained again.", highlight=False)
    if together:
        compare_training(console, original, c, texts, requests, settings)
    with Progress(console=console) as progress:
        report(console, ways(c, [*texts], output, settings.batch), requests, settings, progress)


def compare_training(
    console: Console,
    original: nn.Module,
    c: deltaspec.CompiledModel,
    texts: Mapping[str, Sequence[Request]],
    requests: Sequence[Request],
    settings: Settings,
) -> None:
    """Train all deltas in one pass of mixed batches, and print their accuracies beside those trained one by one."""
    mixed = deltaspec.compile(original, *(spec(task) for task in texts))
    with training.training_progress(console) as progress:
        started = settings.clock()
        train(mixed, texts, settings.epochs, progress)
        took = settings.clock() - started
    table = Table("trained", *texts, title=f"accuracy; training all in one pass took {took:.0f} s")
    for name, trained in (("each by itself", c), ("all in mixed batches", mixed)):
        way = Way(name, oldest(settings.batch), by_row(trained), (trained,))
        found = accuracies(serve(way, requests, [0.0] * len(requests)), requests)
        table.add_row(name, *(f"{found[task]:.3f}" for task in texts))
    console.print(table)


def by_row(c: deltaspec.CompiledModel) -> Callable[[Sequence[Request]], Tensor]:
    """Compute mixed batches: each row under the deltas of its task."""

    def compute(requests: Sequence[Request]) -> Tensor:
        return c(**pad([request.ids for request in requests]), deltas=[deltas(r.task) for r in requests])["task"]

    return compute


def ways(c: deltaspec.CompiledModel, tasks: Sequence[str], folder: Path, size: int) -> list[Way]:
    """Make the ways of serving; `folder` has the saved deltas."""

    def switching(requests: Sequence[Request]) -> Tensor:
        c.only(*deltas(requests[0].task))
        return c(**pad([request.ids for request in requests]))["task"]

    view = c.view()  # the same weights and deltas, with an active set of its own
    for count in range(1, len(tasks) + 1):  # what mixtures need is built now, not when the first of them comes
        for mixture in itertools.combinations(tasks, count):
            view.rows([deltas(task) for task in mixture])

    own = {task: own_model(c, task, folder) for task in tasks}

    def separate(requests: Sequence[Request]) -> Tensor:
        return own[requests[0].task](**pad([request.ids for request in requests]))["task"]

    models = tuple(own.values())
    return [
        Way("one by one, switching", oldest(1), switching, (c,)),
        Way("one by one, a model each", oldest(1), separate, models),
        Way("batches by task, switching", same_task(size), switching, (c,)),
        Way("batches by task, a model each", same_task(size), separate, models),
        Way("mixed batches, a delta a row", oldest(size), by_row(view), (view,)),
    ]


def own_model(c: deltaspec.CompiledModel, task: str, folder: Path) -> nn.Module:
    """Make a model for one task alone: its deltas folded into the weights, or, where they cannot be, beside them."""
    try:
        return c.merge(*deltas(task))
    except deltaspec.DeltaSpecError:  # DS435: an adapter is no change of weights
        return deltaspec.restore(backbone(), folder / task).attach()


def stream(tests: Mapping[str, Sequence[Request]], count: int) -> list[Request]:
    """Draw requests of all tasks, in random order: as many of each, no text twice."""
    each = min(count // len(tests), *(len(texts) for texts in tests.values()))
    requests = [request for texts in tests.values() for request in texts[:each]]
    random.Random(0).shuffle(requests)
    return requests


def accuracies(served: Served, requests: Sequence[Request]) -> dict[str, float]:
    """Compute the share of right answers, by task."""
    right: dict[str, list[bool]] = {}
    for answer, request in zip(served.logits.argmax(dim=1).tolist(), requests, strict=True):
        right.setdefault(request.task, []).append(answer == request.label)
    return {task: sum(answers) / len(answers) for task, answers in right.items()}


def measure(
    served_by: Sequence[Way], requests: Sequence[Request], settings: Settings, progress: Progress
) -> tuple[list[list[Served]], list[list[Served]], float]:
    """Serve all requests as fast as can be, then as they come; rounds in which the ways take turns.

    Gives, by way, what came of each round without and with waiting for requests, and at which rate those came.
    """
    shown = progress.add_task("serve", total=2 * settings.rounds * len(served_by) * len(requests))

    def rounds(arrivals: Callable[[int], Sequence[float]]) -> list[list[Served]]:
        found: list[list[Served]] = [[] for _ in served_by]
        for number in range(settings.rounds):
            for index, way in enumerate(served_by):
                answered = functools.partial(progress.advance, shown)
                found[index].append(serve(way, requests, arrivals(number), settings.clock, answered))
        return found

    for way in served_by:  # first calls build what later ones have
        serve(way, requests[: 2 * settings.batch], [0.0] * 2 * settings.batch)
    at_once = rounds(lambda number: [0.0] * len(requests))
    rate = settings.load * len(requests) / busy(at_once[0])
    return at_once, rounds(lambda number: poisson(len(requests), rate, seed=number)), rate


def report(
    console: Console, served_by: Sequence[Way], requests: Sequence[Request], settings: Settings, progress: Progress
) -> None:
    """Serve and print the table. Raises Disagreement where a way of serving gives other answers than the first."""
    at_once, in_time, rate = measure(served_by, requests, settings, progress)
    expected, tasks = at_once[0][0], dict.fromkeys(request.task for request in requests)
    # Two tables, so that each fits a terminal of 80 columns.
    costs = Table("way of serving", title=f"{len(requests)} requests of {len(tasks)} tasks in random order")
    for heading in ("served\n1/s", "batch\nsize", "mean\nms", "95 %\nms", "weights\nMB"):
        costs.add_column(heading, justify="right")
    answers = Table("way of serving", title="Their answers")
    for heading in (*(f"right\n{task}" for task in tasks), "other\nanswers"):
        answers.add_column(heading, justify="right")
    for way, full, slow in zip(served_by, at_once, in_time, strict=True):
        latencies = 1000 * torch.cat([served.latencies for served in slow])
        differ = 0
        for served in (*full, *slow):
            if not torch.allclose(served.logits, expected.logits, rtol=1e-3, atol=1e-3):
                distance = (served.logits - expected.logits).abs().max().item()
                raise Disagreement(f"{way.name}: logits differ from {served_by[0].name!r} by up to {distance:.2g}")
            differ = max(differ, int((served.logits.argmax(1) != expected.logits.argmax(1)).sum()))
        costs.add_row(
            way.name,
            f"{len(requests) / busy(full):.0f}",
            f"{sum(len(served.logits) for served in slow) / sum(served.batches for served in slow):.1f}",
            f"{latencies.mean():.0f}",
            f"{latencies.quantile(0.95):.0f}",
            f"{weight_bytes(way.models) / 1e6:.1f}",
        )
        shares = accuracies(full[0], requests).values()
        answers.add_row(way.name, *(f"{share:.3f}" for share in shares), str(differ))
    console.print(costs, answers)
    *_, by_task, _, mixed = at_once
    ratios = sorted(one.busy / other.busy for one, other in zip(by_task, mixed, strict=True))
    for line in (
        f"served: all requests wait from the start; rounds: {settings.rounds}, their median.",
        f"Batch size, latency: they come at {rate:.1f}/s on average, independently (Poisson), to one server, which "
        f"takes, when free, up to {settings.batch} of those that wait. Arrivals are simulated, computing is measured.",
        f"Mixed batches serve {statistics.median(ratios):.2f} times (rounds: {ratios[0]:.2f} to {ratios[-1]:.2f}) as "
        "many requests a second as batches by task with switching do, where all wait from the start.",
    ):
        console.print(line, highlight=False)


def busy(rounds: Sequence[Served]) -> float:
    """Return the median of the seconds of computing."""
    return statistics.median(served.busy for served in rounds)


@click.command()
@click.option("--output", type=click.Path(file_okay=False, path_type=Path), help="Where trained deltas are kept.")
@click.option("--quick", is_flag=True, help="Few texts and steps: every part runs, the figures mean little.")
@click.option("--together", is_flag=True, help="Also train all deltas in one pass of mixed batches, and compare.")
@click.option("--requests", type=click.IntRange(min=3), help="Length of the stream.")
@click.option("--batch", type=click.IntRange(min=1), help="Most requests in a batch.")
@click.option("--load", type=click.FloatRange(min=0, min_open=True), help="1: as much as one by one can be served.")
@click.option("--cpu-time", is_flag=True, help="Count the process's own seconds, for a machine that others use.")
def command(
    output: Path | None,
    quick: bool,
    together: bool,
    requests: int | None,
    batch: int | None,
    load: float | None,
    cpu_time: bool,
) -> None:
    """Train three tasks' deltas on one backbone, and serve a stream of mixed requests in several ways."""
    logging.disable_progress_bar()
    console = Console()
    given = {"requests": requests, "batch": batch, "load": load, "clock": time.process_time if cpu_time else None}
    settings = replace(QUICK if quick else Settings(), **{key: v for key, v in given.items() if v is not None})
    output = output or Path("example-output-quick" if quick else "example-output")
    try:
        run(console, output, (data.tweets(), data.topics(), newsgroups()), settings, together)
    except data.MissingPackage as error:
        raise click.UsageError(str(error).replace("make demo", "make example")) from None
    except (Disagreement, deltaspec.DeltaSpecError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    command()
