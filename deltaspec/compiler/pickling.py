"""Pickling of compiled models: the backbone and the deltas; what was built for them is built anew."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from deltaspec.backbone.clone import clone
from deltaspec.backbone.reserved import find
from deltaspec.diagnostics.findings import DeltaSpecError, Diagnostic
from deltaspec.graphs.symbolic import trace
from deltaspec.runtime import forward_gate

if TYPE_CHECKING:
    from torch import nn

    from deltaspec.planning.plan import Plan


def reduced(attachments: Any) -> tuple[Any, ...]:
    """Return what a pickle holds: the backbone without its installed forwards, and without libraries."""
    attachments.libraries.refuse_attached(attachments.active, "pickled")
    twin = clone(attachments.backbone, replace={id(attachments): None})
    forward_gate.remove(twin)
    for fqn, module in twin.named_modules():
        module.__dict__.pop("forward", None)
        if attachments.original_forward(fqn) is not None:
            message = f"{fqn or 'the model'} has a forward of its own (another library's hook), which cannot be pickled"
            hint = "remove the hook first (accelerate: remove_hook_from_module), or use c.save(dir)"
            raise DeltaSpecError([Diagnostic("DS433", message, suggestion=hint)])
    for name in attachments.trained_in_backbone():
        twin.get_parameter(name).requires_grad = True
    return twin, attachments.plan, {name: attachments.strengths[name] for name in attachments.active}


def rebuild(
    kind: Any,
    backbone: nn.Module,
    plan: Plan,
    strengths: Mapping[str, float],
    capture: str,
    capture_reason: str,
    training: bool,
) -> Any:
    """Build a compiled model of this class anew."""
    from deltaspec.compiler.build import assemble, places

    found = find(backbone)
    assert found is not None
    graph = trace(backbone, *places(plan))[0] if capture == "symbolic" else None
    compiled = kind(backbone, *assemble(backbone, found[1], plan, graph, capture, capture_reason))
    compiled.training = training
    compiled._attachments.activate(strengths, strengths=strengths)
    return compiled
