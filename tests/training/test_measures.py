"""Metrics of jobs: what they are to return is said where they do not."""

from __future__ import annotations

import pytest

from deltaspec.diagnostics.findings import DeltaSpecError
from deltaspec.training.job import Job
from deltaspec.training.measures import measure_of, measures_of


def job(metrics, best="loss"):
    return Job("french", data=[], metrics=metrics, best=best, evaluation=[])


def test_what_they_return_is_what_is_measured():
    assert measures_of(job(lambda outputs, batch: {"seen": outputs + batch}), 2, 3) == {"seen": 5}
    assert measures_of(job(None), 2, 3) == {}


@pytest.mark.parametrize(("metrics", "best"), [(lambda *_: 0.5, "loss"), (lambda *_: {"accuracy": 0.5}, "precision")])
def test_what_measures_nothing_is_refused_with_the_name_of_the_job(metrics, best):
    with pytest.raises(DeltaSpecError, match="DS388.*'french'"):
        measures_of(job(metrics, best), 2, 3)


def test_what_judges_a_job_is_found_among_the_measures_of_all():
    measured = {"eval_french_loss": 0.5, "eval_french_f1": 0.75, "eval_german_f1": 0.25}
    assert measure_of("french", "f1", measured, "eval_french_") == 0.75
    with pytest.raises(DeltaSpecError, match="DS388.*'spanish'.*nothing"):
        measure_of("spanish", "f1", measured, "eval_spanish_")


def test_a_job_judged_by_a_metric_has_metrics():
    with pytest.raises(ValueError, match="'french' is judged by 'accuracy'"):
        Job("french", data=[], best="accuracy", evaluation=[])


def test_what_they_raise_says_whose_they_are_and_what_they_get():
    with pytest.raises(TypeError) as caught:
        measures_of(job(lambda outputs, batch: len(outputs)), 2, {})
    assert caught.value.__notes__ == [
        "metrics(outputs, batch) of the job 'french' gets an int and a dict, and returns a mapping: {'accuracy': 0.9}"
    ]
