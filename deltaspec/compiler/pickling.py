"""Pickling of compiled models: the backbone and the deltas; what was built for them is built anew."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from deltaspec.backbone.clone import clone
from deltaspec.backbone.reserved import find
from deltaspec.diagnostics.findings import DeltaSpecError, Diagnostic
from deltaspec.graphs.symbolic import trace
from deltaspec.runtime import turns

if TYPE_CHECKING:
    from torch import nn

    from deltaspec.compiler.compiled import CompiledModel
    from deltaspec.planning.plan import Plan


def reduced(compiled: CompiledModel) -> tuple[Any, ...]:
    """Give what `__reduce__` returns: the backbone without its installed forwards, and without libraries."""
    attachments = compiled._attachments
    attachments.libraries.refuse_attached(compiled.attached, "pickled")
    twin = clone(compiled.backbone, replace={id(attachments): None})
    turns.remove(twin)
    for fqn, module in twin.named_modules():
        module.__dict__.pop("forward", None)
        if attachments.original_forward(fqn) is not None:
            message = f"{fqn or 'the model'} has a forward of its own (another library's hook), which cannot be pickled"
            hint = "remove the hook first (accelerate: remove_hook_from_module), or use c.save(dir)"
            raise DeltaSpecError([Diagnostic("DS433", message, suggestion=hint)])
    for name in attachments.trained_in_backbone():
        twin.get_parameter(name).requires_grad = True
    state = (dict(compiled.strengths), compiled.capture, compiled.capture_reason, compiled.training)
    return _rebuild, (twin, attachments.plan, *state)


def _rebuild(
    backbone: nn.Module, plan: Plan, strengths: Mapping[str, float], capture: str, capture_reason: str, training: bool
) -> CompiledModel:
    from deltaspec.compiler.build import assemble, places

    found = find(backbone)
    assert found is not None
    graph = trace(backbone, *places(plan))[0] if capture == "symbolic" else None
    compiled = assemble(backbone, found[1], plan, graph, capture, capture_reason)
    compiled.training = training
    compiled._attachments.activate(strengths, strengths=strengths)
    return compiled
