"""Views: several compiled models over the same weights and the same deltas, each with an active set of its own.

A view is a structural copy of the backbone (milliseconds, no weight memory) with its own switches, strengths and rows.
All views of a model have the same delta tensors, the same libraries and the same stacks; they are equals, and the one
that was compiled may go before the others.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import torch

from deltaspec.backbone.clone import clone
from deltaspec.deltas.modules import Delta, Deltas
from deltaspec.deltas.modules import beside as delta_beside
from deltaspec.runtime.active import Attachments

if TYPE_CHECKING:
    from torch import nn


def beside(mine: Attachments) -> Attachments:
    """Make the active set of another view, with nothing attached; the locks of switches and views are held."""
    if mine.stacks.home is mine.deltas:  # what all views use must not keep the first one alive
        mine.shown.update(mine.stacks.settle_in(_deltas_beside(mine.deltas)))
    backbone, deltas = _twin(mine)
    attachments = Attachments(backbone, deltas, mine.plan, mine.graph, mine.ports, mine)
    deltas.attachments = attachments
    return attachments


def _twin(mine: Attachments) -> tuple[nn.Module, Deltas]:
    """Copy the structure of a backbone, in the state that it has with nothing attached."""
    builder = mine.builder
    replace: dict[int, Any] = {id(mine.deltas): (deltas := _deltas_beside(mine.deltas))}
    hosts = []
    for fqn, module in builder.modules.items():
        forward = module.__dict__.get("forward")
        if forward is not builder.originals[fqn]:
            replace[id(forward)] = _unbound
            hosts.append(fqn)
    backbone = clone(mine.backbone, replace=replace)
    twins = dict(backbone.named_modules(remove_duplicate=False))
    for fqn in hosts:
        twins[fqn].__dict__.pop("forward", None)
        if (original := builder.originals[fqn]) is not None:
            # It is bound to the module it was put on: bind it to the copy.
            memo: dict[int, Any] = {id(old): twins[name] for name, old in builder.modules.items()}
            twins[fqn].__dict__["forward"] = copy.deepcopy(original, memo)
    if mine.active or mine.mixer.armed:
        for name in mine.trained_in_backbone():
            backbone.get_parameter(name).requires_grad = True
        copies: dict[int, torch.Tensor] = {}
        for fqn, name, buffer, kept in mine.kept_buffers():
            twins[fqn]._buffers[name] = copies.setdefault(id(buffer), kept.clone())
    return backbone, deltas


def _unbound() -> None:
    """Stand for a forward that deltas need, until it is taken out of a copy."""


def _deltas_beside(deltas: Deltas) -> Deltas:
    """Return the deltas of another view: modules of its own, with the same tensors."""
    twin = Deltas()
    twin.training = deltas.training
    for name, delta in deltas._modules.items():
        assert isinstance(delta, Delta)
        twin._modules[name] = delta_beside(delta, delta.training)
    return twin
