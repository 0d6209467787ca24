"""What a job's own metrics say of a batch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from deltaspec.diagnostics.findings import DeltaSpecError, Diagnostic
from deltaspec.training.job import Job


def measures_of(job: Job, outputs: Any, target: Any) -> Mapping[str, float]:
    """Return the measures of a job's rows of a batch. Raise DeltaSpecError (DS388) where they are none, or lack `best`.

    What the metrics themselves raise says whose they are, and what they are given.
    """
    if job.metrics is None:
        return {}
    given = f"metrics(outputs, batch) of the job {job.name!r} gets {_kind(outputs)} and {_kind(target)}"
    try:
        found = job.metrics(outputs, target)
    except Exception as error:
        error.add_note(f"{given}, and returns a mapping: {{'accuracy': 0.9}}")
        raise
    if not isinstance(found, Mapping):
        message, hint = f"the metrics of the job {job.name!r} returned {_kind(found)}", "{'accuracy': 0.9}"
        finding = Diagnostic("DS388", message, "<jobs>", suggestion=f"return the measures by name: {hint}")
        raise DeltaSpecError([finding])
    measure_of(job.name, job.best, {"loss": 0.0, **found})
    return found


def measure_of(job: str, best: str, measured: Mapping[str, float], prefix: str = "") -> float:
    """Return what a job is judged by, of measures that begin so. Raise DeltaSpecError (DS388) where it is not there."""
    measures = {key.removeprefix(prefix): value for key, value in measured.items() if key.startswith(prefix)}
    if best not in measures:
        known = ", ".join(map(repr, measures)) or "nothing"
        message = f"the job {job!r} is judged by {best!r}, and what is measured of it is {known}"
        raise DeltaSpecError([Diagnostic("DS388", message, "<jobs>", suggestion="set best to one of these")])
    return measures[best]


def _kind(value: Any) -> str:
    name = type(value).__name__
    return f"an {name}" if name[0].lower() in "aeiou" else f"a {name}"
