"""Metrics of jobs: what they are to return is said where they do not."""

from __future__ import annotations

import pytest

from deltaspec.diagnostics.findings import DeltaSpecError
from deltaspec.training.job import Job
from deltaspec.training.measures import measures_of


def job(metrics, best="loss"):
    return Job("french", data=[], metrics=metrics, best=best, evaluation=[])


def test_what_they_return_is_what_is_measured():
    assert measures_of(job(lambda outputs, batch: {"seen": outputs + batch}), 2, 3) == {"seen": 5}
    assert measures_of(job(None), 2, 3) == {}


@pytest.mark.parametrize(("metrics", "best"), [(lambda *_: 0.5, "loss"), (lambda *_: {"accuracy": 0.5}, "precision")])
def test_what_measures_nothing_is_refused_with_the_name_of_the_job(metrics, best):
    with pytest.raises(DeltaSpecError, match="DS388.*'french'"):
        measures_of(job(metrics, best), 2, 3)


def test_what_they_raise_says_whose_they_are_and_what_they_get():
    with pytest.raises(TypeError) as caught:
        measures_of(job(lambda outputs, batch: len(outputs)), 2, {})
    assert caught.value.__notes__ == [
        "metrics(outputs, batch) of the job 'french' gets an int and a dict, and returns a mapping: {'accuracy': 0.9}"
    ]
