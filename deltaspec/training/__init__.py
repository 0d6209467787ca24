"""Training: many jobs on one backbone in one pass, and what trainers of other libraries need to know of deltas.

Uses compiled models as a user would.
"""

from deltaspec.training.schedules import scheduler as scheduler

__all__ = ["scheduler"]
