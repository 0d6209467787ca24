"""The examples: the queue that requests are served from, and the whole multitask story on a handful of texts."""

import importlib
import io
import random
from dataclasses import replace

import pytest
import torch
from click.testing import CliRunner
from repository import ROOT
from rich.console import Console
from torch import nn

import deltaspec
from deltaspec.demo import data
from deltaspec.demo.data import Split, Task

EXAMPLES = ROOT / "examples"


@pytest.fixture
def queue(monkeypatch):
    monkeypatch.syspath_prepend(EXAMPLES)
    return importlib.import_module("serving_queue")


@pytest.fixture
def example(monkeypatch):
    monkeypatch.syspath_prepend(EXAMPLES)
    return importlib.import_module("multitask_serving")


class Clock:
    """Goes on by a second between the start and the end of each batch."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self) -> float:
        self.calls += 1
        return float(self.calls // 2)


def served(queue, choose, tasks: str, arrivals: list[float]):
    requests = [queue.Request(task, torch.tensor([number]), 0) for number, task in enumerate(tasks)]
    batches = []

    def compute(batch):
        batches.append([int(request.ids) for request in batch])
        return torch.stack([request.ids for request in batch])

    found = queue.serve(queue.Way("", choose, compute, ()), requests, arrivals, Clock())
    assert found.logits.flatten().tolist() == list(range(len(tasks)))
    assert (found.busy, found.batches) == (len(batches), len(batches))
    return batches, found.latencies.tolist()


def test_queue_serves_the_oldest_first(queue):
    batches, latencies = served(queue, queue.oldest(2), "abcab", [0.0, 0.0, 0.5, 0.5, 9.0])
    assert batches == [[0, 1], [2, 3], [4]]
    assert latencies == [1.0, 1.0, 1.5, 1.5, 1.0]


def test_queue_serves_the_task_that_waits_for_longest(queue):
    batches, latencies = served(queue, queue.same_task(2), "abaab", [0.0, 0.0, 0.0, 0.0, 0.5])
    assert batches == [[0, 2], [1, 4], [3]]
    assert latencies == [1.0, 2.0, 1.0, 3.0, 1.5]


def test_arrivals_are_as_frequent_as_asked_for_and_repeatable(queue):
    times = queue.poisson(4000, rate=8.0, seed=1)
    assert times == sorted(times) == queue.poisson(4000, rate=8.0, seed=1) != queue.poisson(4000, rate=8.0, seed=2)
    assert times[-1] == pytest.approx(500, rel=0.1)


def test_shared_weights_count_once(queue):
    linear = nn.Linear(4, 4)
    assert queue.weight_bytes([linear, nn.Sequential(linear)]) == 80
    assert queue.weight_bytes([linear, nn.Linear(4, 4)]) == 160


def toy(name: str, classes: int) -> Task:
    """Make a task of which each class has words of its own."""
    words = ["ship sea wave", "wheat barn plough", "bank rate loan", "dollar yen", "port cargo", "tariff export"]
    pick = random.Random(0)
    texts = [
        (f"{name} {' '.join(pick.choices(words[i % classes].split(), k=4 + i % 5))}", i % classes) for i in range(16)
    ]
    split = Split(*zip(*texts, strict=True))
    return Task(name, "which words?", tuple(words[:classes]), split, split)


@pytest.fixture
def toys() -> list[Task]:
    return [toy("tweets", 2), toy("topics", 6), toy("groups", 4)]


def test_all_ways_of_serving_give_the_same_answers(minilm_dir, example, toys, tmp_path):
    console = Console(record=True, width=160, file=io.StringIO())
    settings = example.Settings(train=6, epochs=1, requests=12, batch=4, rounds=1)
    example.run(console, tmp_path, toys, settings, together=True)
    printed = console.export_text()
    rows = [[cell.strip() for cell in line.strip("│").split("│")] for line in printed.splitlines() if "│" in line]
    (one, mixed), costs, answers = rows[:2], rows[2:7], rows[7:]
    assert (one[0], mixed[0]) == ("each by itself", "all in mixed batches")
    assert [way[0] for way in costs] == [way[0] for way in answers]
    assert {way[-1] for way in answers} == {"0"}
    assert {tuple(way[1:-1]) for way in answers} == {tuple(one[1:])}
    memory = {way[0]: float(way[5]) for way in costs}
    assert memory["one by one, a model each"] > 2.9 * memory["mixed batches, a delta a row"]

    saved = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.safetensors")}
    assert len(saved) == 6
    with pytest.raises(example.Disagreement, match="second.*differ from 'first'"):
        right = example.Way("first", example.oldest(4), lambda batch: torch.zeros(len(batch), 2), ())
        wrong = replace(right, name="second", compute=lambda batch: torch.ones(len(batch), 2))
        requests = example.stream({"tweets": example.encode(toys[0], toys[0].test)}, 8)
        example.report(console, [right, right, right, wrong], requests, settings, example.Progress(console=console))
    assert all(path.stat().st_mtime_ns == before for path, before in saved.items())


def test_specs_of_the_examples_are_valid():
    specs = sorted(EXAMPLES.rglob("*.deltaspec.yaml"))
    assert len(specs) == 7
    assert [finding for path in specs for finding in deltaspec.validate(path)] == []


def test_without_data_the_example_says_what_to_install(example, monkeypatch, tmp_path):
    monkeypatch.setattr(data, "TEXTS", "no-such-texts")
    result = CliRunner().invoke(example.command, ["--output", str(tmp_path / "out")])
    assert result.exit_code == 2
    assert "make example" in result.output
    assert not (tmp_path / "out").exists()
