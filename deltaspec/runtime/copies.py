"""Structural copies of a view: over the same weights, in milliseconds, in the state that it has with nothing attached.

Views are several compiled models over the same weights and the same deltas, each with an active set, strengths and rows
of its own. They have the same delta tensors, libraries and stacks; they are equals, and the one that was compiled may
go before the others.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from deltaspec.backbone.clone import clone
from deltaspec.backbone.copying import copy_held
from deltaspec.backbone.reserved import remove
from deltaspec.deltas.modules import Deltas
from deltaspec.deltas.modules import beside as delta_beside
from deltaspec.runtime import forward_gate
from deltaspec.runtime.active import Active
from deltaspec.runtime.host import Host


def bare_copy(host: Host, deltas: Deltas | None = None) -> nn.Module:
    """Return a clone of the backbone whose modules have the forwards that they had before any delta.

    Its deltas are these, or copies that nobody owns. Parameters are those of the backbone as it is, flags included.
    """
    replace: dict[int, Any] = {id(host.deltas.owner): None} if deltas is None else {id(host.deltas): deltas}
    changed = []
    for fqn, module in host.modules.items():
        forward = module.__dict__.get("forward")
        if forward is not host.originals[fqn]:
            replace[id(forward)] = _unbound
            changed.append(fqn)
    backbone = clone(host.backbone, replace=replace)
    forward_gate.remove(backbone)
    twins = dict(backbone.named_modules(remove_duplicate=False))
    for fqn in changed:
        twins[fqn].__dict__.pop("forward", None)
        if (original := host.originals[fqn]) is not None:
            # It is bound to the module it was put on: bind it to the copy.
            memo: dict[int, Any] = {id(old): twins[name] for name, old in host.modules.items()}
            twins[fqn].__dict__["forward"] = copy_held(original, host.modules[fqn], memo)
    return backbone


def without_deltas(host: Host) -> nn.Module:
    """Return a plain clone of the backbone, with the forwards that it had before it was compiled."""
    plain = bare_copy(host)
    remove(plain)
    return plain


def beside(mine: Active) -> Active:
    """Return the active set of another view, with nothing attached; the locks of switches and views are held."""
    shared, host = mine.shared, mine.host
    if shared.is_home(host.deltas):  # what all views use must not keep the first one alive
        mine.owner.keep(shared.stacks.settle_in(_deltas_beside(host.deltas)))
    backbone = bare_copy(host, deltas := _deltas_beside(host.deltas))
    if mine.acts:
        for name in host.trained_in_backbone():
            backbone.get_parameter(name).requires_grad = True
        copies: dict[int, Tensor] = {}
        for fqn, name, buffer, kept in host.kept_buffers():
            module = backbone.get_submodule(fqn)
            if (written := module._parameters.get(name)) is not None:
                written.data = kept.clone()
            else:
                module._buffers[name] = copies.setdefault(id(buffer), kept.clone())
    return Active(shared, Host(backbone, deltas), mine.residency, mine.graph)


def _unbound() -> None:
    """Stand for a forward that deltas need, until it is taken out of a copy."""


def _deltas_beside(deltas: Deltas) -> Deltas:
    """Return the deltas of another view: modules of its own, with the same tensors."""
    twin = Deltas()
    twin.training = deltas.training
    for delta in deltas.held():
        twin.add(delta_beside(delta, delta.training))
    return twin
