"""Training: many jobs on one backbone in one pass, and what trainers of other libraries need to know of deltas.

Uses compiled models as a user would.
"""

from deltaspec.training.job import Job as Job
from deltaspec.training.run import Training as Training
from deltaspec.training.schedules import scheduler as scheduler

__all__ = ["Job", "Training", "scheduler"]
