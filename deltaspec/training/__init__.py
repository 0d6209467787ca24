"""Training: many jobs on one backbone in one pass, and what trainers of other libraries need to know of deltas.

Uses compiled models as a user would.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from deltaspec.names.packages import given_by

if TYPE_CHECKING:
    from deltaspec.training.job import Job as Job
    from deltaspec.training.jobs_trainer import JobsTrainer as JobsTrainer
    from deltaspec.training.run import Training as Training
    from deltaspec.training.schedules import scheduler as scheduler
    from deltaspec.training.trainer import DeltaTrainerMixin as DeltaTrainerMixin

_HOME = {
    "DeltaTrainerMixin": "trainer",
    "Job": "job",
    "JobsTrainer": "jobs_trainer",
    "Training": "run",
    "scheduler": "schedules",
}
__all__ = sorted(_HOME)
__getattr__, __dir__ = given_by(__name__, _HOME)
