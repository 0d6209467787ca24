"""Passes over region graphs: the same values, within round-off, from fewer steps.

One file a pass. A pass touches only what deltas emitted, never the host's own code, and has a test of equality and a
row of `benchmarks/forward.py` that pays for it.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import fx, nn

from deltaspec.graphs.passes import fuse_addition, fuse_rows, keep_scales, recompute, share_inputs, share_products
from deltaspec.graphs.passes.scope import Scope


def run_passes(
    graph: fx.Graph,
    owned: bool = False,
    home: str | None = None,
    modules: Mapping[str, nn.Module] | None = None,
    how: recompute.How | None = None,
) -> None:
    """Run all passes over a region's graph, in place.

    `owned`: what `base` gives is a new tensor that nothing else holds, so it may be overwritten. `home`: the FQN under
    which a whole model's graph finds its deltas, and `modules` what it calls; None where the deltas' tensors are the
    graph's inputs. `how`: in which way sites train in one step; None where they do not.
    """
    scope = Scope(graph, owned, home)
    fuse_addition.run(scope)
    share_products.run(scope)
    if modules is not None:
        share_inputs.run(scope, modules)
    fuse_rows.run(scope)
    if how is not None and how.own:
        recompute.run(scope, how)
    keep_scales.run(graph)
