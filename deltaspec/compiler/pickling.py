"""Pickling of compiled models: the backbone and the deltas; what was built for them is built anew."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TypeVar
from weakref import WeakKeyDictionary

from torch import Tensor, nn

from deltaspec.backbone.reserved import find
from deltaspec.compiler.build import Built, assemble, places
from deltaspec.diagnostics.findings import DeltaSpecError, Diagnostic
from deltaspec.graphs.symbolic import trace
from deltaspec.planning.plan import Plan
from deltaspec.runtime.copies import bare_copy

_Model = TypeVar("_Model", bound=nn.Module)
_sent: WeakKeyDictionary[nn.Module, list[Tensor]] = WeakKeyDictionary()
"""Buffers of what was pickled last, by backbone: torch hands them to a process that it spawns as open files, and these
close with them.
"""


def reduced(built: Built) -> tuple[nn.Module, Plan, dict[str, float], bool]:
    """Return what a pickle holds: the backbone without its installed forwards, the plan, what is attached, and whether
    the backbone may be trained.

    Raise DeltaSpecError where a delta of a library is attached (DS533), or a module has a hook's forward (DS433).
    """
    active, shared, host, libraries, _ = built
    libraries.refuse_attached(active.active, "pickled")
    active.follow_others()
    for fqn in host.modules:
        if host.has_foreign(fqn):
            message = f"{fqn or 'the model'} has a forward of its own (another library's hook), which cannot be pickled"
            hint = "remove the hook first (accelerate: remove_hook_from_module), or use c.save(dir)"
            raise DeltaSpecError([Diagnostic("DS433", message, suggestion=hint)])
    twin, _ = bare_copy(host)
    for name in host.trained_in_backbone():
        twin.get_parameter(name).requires_grad = True
    _sent[host.backbone] = list(twin.buffers())
    return twin, shared.plan, {name: active.strengths[name] for name in active.active}, host.trained


def rebuild(
    kind: Callable[[Built, str, str], _Model],
    backbone: nn.Module,
    plan: Plan,
    strengths: Mapping[str, float],
    trained: bool,
    capture: str,
    reason: str,
    training: bool,
) -> _Model:
    """Build a compiled model of this class anew from what a pickle held."""
    found = find(backbone)
    assert found is not None
    graph = trace(backbone, *places(plan))[0] if capture == "symbolic" else None
    built = assemble(backbone, found[1], plan, graph, trained=trained)
    built.active.activate(strengths, strengths=strengths)
    compiled = kind(built, capture, reason)
    compiled.training = training
    return compiled
