"""Structural copies of a view: over the same weights, in milliseconds, in the state that it has with nothing attached.

Views are several compiled models over the same weights and the same deltas, each with an active set, strengths and rows
of its own. They have the same delta tensors, libraries and stacks; they are equals, and the one that was compiled may
go before the others.
"""

from __future__ import annotations

import functools
from typing import Any

from torch import Tensor, nn

from deltaspec.backbone.clone import clone
from deltaspec.backbone.copying import copy_held
from deltaspec.backbone.reserved import remove
from deltaspec.deltas.modules import Deltas
from deltaspec.deltas.modules import beside as delta_beside
from deltaspec.runtime import forward_gate, verbs
from deltaspec.runtime.active import Active
from deltaspec.runtime.host import Host
from deltaspec.runtime.pickled_alone import unmark
from deltaspec.runtime.sockets import Socket


def bare_copy(host: Host, deltas: Deltas | None = None) -> tuple[nn.Module, dict[int, Socket]]:
    """Return a clone of the backbone whose modules have the forwards that they have without any delta, and its sockets.

    Wrappers that other libraries put around ours stay, around the sockets that are returned, by id of their module.
    The clone's deltas are these, or copies that nobody owns. Parameters are those of the backbone as it is, flags
    included.
    """
    replace: dict[int, Any] = {id(host.deltas.owner): None} if deltas is None else {id(host.deltas): deltas}
    calls = {place: functools.partial(_unbound) for place in host.sockets}
    replace |= {id(socket.call): calls[place] for place, socket in host.sockets.items()}
    backbone = clone(host.backbone, replace=replace)
    forward_gate.remove(backbone)
    verbs.remove(backbone)
    twins = dict(backbone.named_modules(remove_duplicate=False))
    memo: dict[int, Any] = {id(module): twins[fqn] for fqn, module in host.modules.items()}
    sockets = {}
    for place, socket in host.sockets.items():
        twin, call = memo[place], calls[place]
        unmark(twin)
        if twin.__dict__.get("forward") is call:
            del twin.__dict__["forward"]
            if socket.original is not None:  # it is bound to the module it was put on: bind it to the copy
                twin.__dict__["forward"] = copy_held(socket.original, socket.module, memo)
        sockets[id(twin)] = Socket(twin, call)
    return backbone, sockets


def without_deltas(host: Host) -> nn.Module:
    """Return a plain clone of the backbone, with the forwards that it had before it was compiled."""
    plain, _ = bare_copy(host)
    remove(plain)
    return plain


def beside(mine: Active) -> Active:
    """Return the active set of another view, with nothing attached; the locks of switches and views are held."""
    shared, host = mine.shared, mine.host
    if shared.is_home(host.deltas):  # what all views use must not keep the first one alive
        mine.owner.keep(shared.stacks.settle_in(_deltas_beside(host.deltas)))
    backbone, sockets = bare_copy(host, deltas := _deltas_beside(host.deltas))
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
    return Active(shared, Host(backbone, deltas, sockets, trained=host.trained), mine.residency, mine.graph)


def _unbound() -> None:
    """Stand for a forward that deltas need, until it is taken out of a copy."""


def _deltas_beside(deltas: Deltas) -> Deltas:
    """Return the deltas of another view: modules of its own, with the same tensors."""
    twin = Deltas()
    twin.training = deltas.training
    for delta in deltas.held():
        twin.add(delta_beside(delta, delta.training))
    return twin
