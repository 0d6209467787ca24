"""In which way sites train: what passes over training steps may do at a host."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence

from torch import nn

from deltaspec.graphs.activations import Activation, activate
from deltaspec.graphs.dropouts import drop
from deltaspec.graphs.elementwise import is_elementwise
from deltaspec.graphs.links import Link
from deltaspec.graphs.passes.recompute import How
from deltaspec.names.paths import below
from deltaspec.runtime.host import Host
from deltaspec.runtime.placements import Placement
from deltaspec.runtime.sockets import Forward


def trained_by(placements: Sequence[Placement], links: Sequence[Link], own: bool) -> How | None:
    """Return in which way a host trains, where passes change that. All its deltas must let a pass work on it.

    `own`: its forward is that of a class which gives a new tensor.
    """
    passes = frozenset.intersection(*(placement.passes for placement in placements))
    if not links or "recompute" not in passes:
        return None
    return How(own, links[0].form.kind == "conv1d", "rematerialise" in passes, "feed_forward" in passes)


def activations(hosts: Mapping[str, Sequence[Placement]], host: Host) -> Iterator[tuple[str, Forward]]:
    """Yield the forwards of the activations beside these hosts: (FQN, forward).

    They stand in the module that owns a linear layer with a delta, and are nobody else's.
    """
    owners = [
        fqn.rpartition(".")[0]
        for fqn, placements in hosts.items()
        if all(p.passes >= _BOTH and p.planned.site.kind in ("linear", "conv1d") for p in placements)
    ]
    for owner in dict.fromkeys(owners):
        for name, module in host.modules[owner]._modules.items() if owner in host.modules else ():
            fqn = below(owner, name)
            if module is None or fqn in hosts or fqn not in host.modules or not is_elementwise(module):
                continue
            if not host.has_foreign(fqn):
                yield fqn, functools.partial(activate, host.own_forward(fqn), module, Activation())


def dropouts(hosts: Mapping[str, Sequence[Placement]], host: Host) -> Iterator[tuple[str, Forward]]:
    """Yield the forwards of the backbone's own dropouts: (FQN, forward), where all deltas let a pass work on them."""
    if not hosts or not all("dropout" in p.passes for placements in hosts.values() for p in placements):
        return
    for fqn, module in host.modules.items():
        if type(module) is nn.Dropout and module.p and fqn not in hosts and not host.has_foreign(fqn):
            yield fqn, functools.partial(drop, host.own_forward(fqn), module)


_BOTH = frozenset(("recompute", "feed_forward"))
