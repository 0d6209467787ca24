"""What came of jobs, as a table, as data, as curves."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Mapping
from io import StringIO
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING

from deltaspec.diagnostics.findings import DeltaSpecError, Diagnostic
from deltaspec.documents.atomic import write_atomically
from deltaspec.training.curves import draw
from deltaspec.training.outcome import JobResult

if TYPE_CHECKING:
    from rich.table import Table

WIDTH = 120


class Means:
    """Means of measures over rows."""

    def __init__(self) -> None:
        self.sums: dict[str, float] = {}
        self.rows = 0

    def add(self, measures: Mapping[str, float], rows: int) -> None:
        """Take in means over some rows."""
        for name, value in measures.items():
            self.sums[name] = self.sums.get(name, 0.0) + float(value) * rows
        self.rows += rows

    def become(self, others: Iterable[Means]) -> None:
        """Be the means over all rows of these."""
        self.sums, self.rows = {}, 0
        for each in others:
            for name, value in each.sums.items():
                self.sums[name] = self.sums.get(name, 0.0) + value
            self.rows += each.rows

    def of(self, job: str) -> dict[str, float]:
        """Return the means over all rows. Raises DeltaSpecError (DS383) where there were none."""
        if not self.rows:
            message, hint = f"the evaluation of the job {job!r} has no batches", "give it what can be iterated anew"
            raise DeltaSpecError([Diagnostic("DS383", message, "<jobs>", suggestion=hint)])
        return {name: value / self.rows for name, value in self.sums.items()}


class Results(tuple[JobResult, ...]):
    """What came of all jobs. Printed, it is a table."""

    __slots__ = ()

    def job(self, name: str) -> JobResult:
        """Return the result of a job by its name. Raises KeyError."""
        return {result.name: result for result in self}[name]

    def best(self) -> JobResult:
        """Return the result of the job with the best evaluation. Raises ValueError where none was evaluated."""
        measured = [result for result in self if result.best]
        if not measured:
            raise ValueError("no job was evaluated: give them evaluation=…")
        by = measured[0].best_by
        return (min if by == "loss" else max)(measured, key=lambda result: result.best[by])

    def plot(self, path: str | PathLike[str]) -> None:
        """Draw the learning curves into a file (`.png`, `.svg` …): losses, evaluations, learning rates."""
        draw(self, Path(path))

    def save(self, path: str | PathLike[str]) -> None:
        """Write them to a file: `.json` has all, `.csv` a line for each step and evaluation, else it is the table."""
        path = Path(path)
        if path.suffix == ".json":
            text = json.dumps([result.to_data() for result in self], indent=1) + "\n"
        else:
            text = _lines(self) if path.suffix == ".csv" else f"{self}\n"
        write_atomically(path, text.encode())

    def __rich__(self) -> Table:
        return table(self)

    def __str__(self) -> str:
        from rich.console import Console

        text = StringIO()
        Console(file=text, width=WIDTH, color_system=None).print(table(self))
        return text.getvalue().rstrip()


def table(results: Iterable[JobResult]) -> Table:
    """Draw how far jobs are: a line each."""
    from rich.table import Table
    from rich.text import Text

    results = list(results)
    measures = list(dict.fromkeys(name for result in results for e in result.evaluations for name in e.measures))
    drawn = Table()
    drawn.add_column("job", overflow="fold")
    # Of the best evaluation, by whichever measure a job is judged.
    for title in ("step", "loss", "rate", *(f"eval {name}" for name in measures)):
        drawn.add_column(title, justify="right")
    drawn.add_column("")
    for result in results:
        last = result.losses[-10:]
        cells = [
            f"{result.step}/{result.steps}",
            f"{sum(last) / len(last):.4g}" if last else "–",
            f"{result.rates[-1]:.2g}" if last else "–",
            *(f"{result.best[name]:.4g}" if name in result.best else "–" for name in measures),
        ]
        said = f"{result.status}: {result.reason}" if result.reason else result.status
        drawn.add_row(Text(result.name), *cells, Text(said))
    return drawn


def _lines(results: Iterable[JobResult]) -> str:
    text = StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(("job", "step", "measure", "value"))
    for result in results:
        for step, (loss, rate) in enumerate(zip(result.losses, result.rates, strict=True), start=1):
            writer.writerows([(result.name, step, "train loss", repr(loss)), (result.name, step, "rate", repr(rate))])
        for each in result.evaluations:
            writer.writerows((result.name, each.step, name, repr(value)) for name, value in each.measures.items())
    return text.getvalue()
