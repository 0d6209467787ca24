"""Passes over region graphs: the same values, within round-off, from fewer steps.

One file a pass. A pass touches only what deltas emitted, never the host's own code, and has a test of equality and a
row of `benchmarks/forward.py` that pays for it.
"""

from __future__ import annotations

from torch import fx

from deltaspec.passes import fuse_addition, fuse_rows, share_products
from deltaspec.passes._scope import Scope


def run_passes(graph: fx.Graph, owned: bool = False, home: str | None = None) -> None:
    """Run all passes over a region's graph, in place.

    `owned`: what `base` gives is a new tensor that nothing else holds, so it may be overwritten. `home`: the FQN under
    which a whole model's graph finds its deltas; None where their tensors are the graph's inputs.
    """
    scope = Scope(graph, owned, home)
    fuse_addition.run(scope)
    share_products.run(scope)
    fuse_rows.run(scope)
