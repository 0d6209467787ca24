"""What can be measured, by name: imported when it is run, so that what fails in one group stays there."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from benchmarks.harness import Item


@dataclass(frozen=True)
class Group:
    """A function that measures, and what it is about."""

    place: str
    """`file:function`, in this folder."""
    title: str

    def load(self) -> Callable[[], Iterable[Item]]:
        """Import the function."""
        file, function = self.place.split(":")
        found: Callable[[], Iterable[Item]] = getattr(importlib.import_module(f"benchmarks.{file}"), function)
        return found


GROUPS = {
    "switching": Group("switching:switching", "Switching between loaded deltas"),
    "loading": Group("many:loading", "Many saved deltas"),
    "reading": Group("adapters:reading", "Reading PEFT directories"),
    "compiling": Group("rows:compiling", "Compiling a spec"),
    "forwards": Group("forward:forwards", "Forward with a delta attached"),
    "passes": Group("forward:passes", "What each pass over a region pays"),
    "tokens": Group("tokens:over_tokens", "Forward over the number of tokens, and merged"),
    "mixing": Group("mixing:mixing", "A delta for each row of a batch"),
    "graphs": Group("graphs:graphs", "Compiled graphs"),
    "training": Group("training:training", "Training"),
    "jobs": Group("jobs:jobs", "Many jobs in one batch"),
    "saving": Group("rows:saving", "Restoring"),
    "validating": Group("rows:validating", "Validating"),
    "scaling": Group("scaling:scaling", "Scaling: sites, ranks, layers, rows"),
}
