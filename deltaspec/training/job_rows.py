"""Rows of a data set that say which job they are of: put into batches, and told apart."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch

from deltaspec.diagnostics.findings import DeltaSpecError, Diagnostic
from deltaspec.diagnostics.wording import closest_delta, show_value

COLUMN = "job"
"""Column of a data set that says which job an example is of."""


class WithJobs:
    """A collator that lets another one make a batch, and adds the number of each example's job."""

    def __init__(self, collate: Any, names: Sequence[str]) -> None:
        self.collate, self.numbers = collate, {name: number for number, name in enumerate(names)}

    def __call__(self, features: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Make a batch. Raises DeltaSpecError (DS386) for examples of no job."""
        names: list[Any] = [feature.get(COLUMN) for feature in features]
        if unknown := [name for name in dict.fromkeys(names) if name not in self.numbers]:
            raise DeltaSpecError([self._unknown(name) for name in unknown])
        batch = self.collate([{key: value for key, value in each.items() if key != COLUMN} for each in features])
        return {**batch, COLUMN: torch.tensor([self.numbers[name] for name in names])}

    def _unknown(self, name: Any) -> Diagnostic:
        message = f'an example has no "{COLUMN}"' if name is None else f"an example is of the job {show_value(name)}"
        near = closest_delta(str(name), self.numbers)
        hint = f"did you mean {near!r}?" if near and name is not None else f"jobs are: {', '.join(self.numbers)}"
        return Diagnostic("DS386", message, "<jobs>", suggestion=hint)

    def __getattr__(self, name: str) -> Any:
        if name == "collate":  # not there yet: this is being unpickled
            raise AttributeError(name)
        return getattr(self.collate, name)


def unknown_jobs(what: str, given: Iterable[str], jobs: Iterable[str]) -> list[Diagnostic]:
    """Return a finding (DS382) for each job that something is given for, and that is not there."""
    known = tuple(jobs)
    found = []
    for name in given:
        if name not in known:
            near = closest_delta(name, known)
            hint = f"did you mean {near!r}?" if near else f"jobs are: {', '.join(known)}"
            message = f"{what} is given for {show_value(name)}, and there is no such job"
            found.append(Diagnostic("DS382", message, "<jobs>", suggestion=hint))
    return found


def by_job(data: Any) -> dict[str, Any]:
    """Return the part of a data set that each job has, by name."""
    column = data[COLUMN] if hasattr(data, "column_names") else (data[number][COLUMN] for number in range(len(data)))
    found: dict[str, list[int]] = {}
    for number, name in enumerate(column):
        found.setdefault(name, []).append(number)
    return {name: _chosen_rows(data, rows) for name, rows in found.items()}


def _chosen_rows(data: Any, rows: list[int]) -> Any:
    """Return some rows of a data set."""
    return data.select(rows) if hasattr(data, "select") else torch.utils.data.Subset(data, rows)
