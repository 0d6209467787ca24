"""In which way sites train: what passes over training steps may do at a host."""

from __future__ import annotations

from collections.abc import Sequence

from deltaspec.graphs.links import Link
from deltaspec.graphs.passes.recompute import How
from deltaspec.runtime.placements import Placement


def trained_by(placements: Sequence[Placement], links: Sequence[Link], own: bool) -> How | None:
    """Return in which way a host trains in one step of autograd; None where it does not.

    `own`: its forward is that of a class which gives a new tensor. All its deltas must let a pass work on it.
    """
    passes = frozenset.intersection(*(placement.passes for placement in placements))
    if not own or not links or "recompute" not in passes:
        return None
    return How(links[0].form.kind == "conv1d", "rematerialise" in passes, "feed_forward" in passes)
