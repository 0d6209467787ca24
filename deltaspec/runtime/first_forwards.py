"""The first forward of each kind, in models with code of their own: what they write, and which deltas they go around.

What torch and transformers publish is known. A forward of a user's may do in training mode, with labels or in a step
after a cache what no forward before showed, so the first of each such kind is seen.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from deltaspec.backbone.recorder import Observation
from deltaspec.backbone.writes import OwnOnWrite, is_published
from deltaspec.deltas.modules import storage_key
from deltaspec.diagnostics.findings import DeltaSpecError, Diagnostic
from deltaspec.runtime.checkpointing import tensors_in
from deltaspec.runtime.host import Host
from deltaspec.runtime.placements import Placements
from deltaspec.runtime.proving import refuse_bypassed, watched

Names = tuple[str, ...]


class Attached(Protocol):
    """What is attached in a view."""

    active: Names


class Known(Protocol):
    """What is known of deltas."""

    placements: Placements
    unproven: set[str]


class FirstForwards:
    """Sees the first forward of each kind: in a mode, with these arguments, under these deltas."""

    def __init__(self, view: Attached, host: Host, shared: Known) -> None:
        self._view, self._host, self._shared = view, host, shared
        self._modes: set[bool] = set()
        """Modes whose first forward showed what it writes."""
        self._seen: dict[Any, dict[str, Observation]] = {}
        """What a forward of a kind did, by kind."""
        self._checked: set[tuple[Any, Names]] = set()
        """Kinds of forwards under sets of deltas that none of them goes around."""

    @classmethod
    def of(cls, view: Attached, host: Host, shared: Known, *, around: bool = False) -> Callable[..., Any] | None:
        """Return what runs outermost forwards of a view; None where all code is published, and none is `around`."""
        return cls(view, host, shared).run if around or not all(map(is_published, host.modules.values())) else None

    def run(self, forward: Callable[..., Any], root: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """Run a forward of the backbone, or of what stands around it, and look at it if it is the first of its kind."""
        names = self._view.active if self._host.gate.rows is None else ()  # what rows are under is proven there
        kind = _kind(root.training, args, kwargs)
        if (kind, names) in self._checked:
            return forward(root, *args, **kwargs)
        modules = list(self._host.modules.values())
        unseen = root.training not in self._modes
        with OwnOnWrite(modules, self._host.buffers.wrote) if unseen else nullcontext():
            output = self._checking(kind, names, partial(forward, root), args, kwargs)
        self._modes.add(root.training)
        self._checked.add((kind, names))
        return output

    def _checking(self, kind: Any, names: Names, forward: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if not names:
            return forward(*args, **kwargs)
        held: dict[tuple[str, str], Tensor] = {}
        handle = self._host.backbone.register_forward_pre_hook(lambda *_: held.update(self._trained(names)))
        try:
            if self._keeps_fast_path(names):
                return forward(*args, **kwargs)
            if kind in self._seen:
                output = forward(*args, **kwargs)
            else:
                output, self._seen[kind] = watched(self._host.backbone, forward, *args, **kwargs)
        finally:
            handle.remove()
        held = held or self._trained(names)  # what runs may go around the backbone's own forward
        refuse_bypassed(self._shared.placements, self._seen[kind], names)
        if torch.is_grad_enabled() and not _is_transformed():
            self._refuse_unreached(held, self._seen[kind], output)
        return output

    def _keeps_fast_path(self, names: Names) -> bool:
        """Return whether watching would take a forward off torch's fast path of attention, and so change last bits.

        Then what was observed at planning has to do.
        """
        if torch.is_grad_enabled() or self._host.backbone.training or not self._shared.unproven.isdisjoint(names):
            return False
        return any(isinstance(module, nn.MultiheadAttention) for module in self._host.modules.values())

    def _trained(self, names: Names) -> dict[tuple[str, str], Tensor]:
        """Return the tensors that training would change, by delta and key, as they stand in this forward."""
        deltas = ((name, self._host.deltas[name]) for name in names)
        return {(name, key): t for name, delta in deltas for key, t in delta.tensors() if t.requires_grad}

    def _refuse_unreached(self, held: dict[tuple[str, str], Tensor], seen: dict[str, Observation], output: Any) -> None:
        """Raise DeltaSpecError (DS468) for deltas that train, and of which nothing came into the output's graph."""
        given = [tensor for tensor in tensors_in(output) if tensor.is_floating_point()]
        variables, nodes, whole = _graph(given)
        if not given or not whole:
            return
        reached = {
            place for place, t in held.items() if id(t) in variables or (t.grad_fn is not None and t.grad_fn in nodes)
        }
        findings = []
        for name in dict.fromkeys(name for name, _ in held):
            if not any(other == name for other, _ in reached):
                findings.append(_unreached(name, "no site of it"))
                continue
            for placement in self._shared.placements.of(name):
                site = placement.planned.site
                own = {(name, storage_key(site.row.fqn, spec)) for spec in placement.planned.tensors} & held.keys()
                if own and own.isdisjoint(reached) and seen[site.row.fqn].called:
                    findings.append(_unreached(name, f"{site.fqn}, which is called,"))
        if findings:
            raise DeltaSpecError(findings)


def _is_transformed() -> bool:
    """Return whether torch.func runs a forward (vmap, grad), whose graph is of other tensors than are seen here."""
    return torch._C._functorch.maybe_current_level() is not None  # noqa: SLF001 (nothing public tells)


def _kind(training: bool, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...]:
    """Return what may make a forward go another way: mode, gradients, the arguments given, a single position."""
    first = args[0] if args else next(iter(kwargs.values()), None)
    single = isinstance(first, Tensor) and first.dim() > 1 and first.shape[1] == 1
    given = tuple([name for name, value in kwargs.items() if value is not None])
    return training, torch.is_grad_enabled(), len(args), given, single


def _graph(tensors: list[Tensor]) -> tuple[set[int], set[Any], bool]:
    """Return the variables and nodes that tensors were computed from, and whether these are all that there are."""
    waiting: list[Any] = [tensor.grad_fn for tensor in tensors if tensor.grad_fn is not None]
    variables, nodes = {id(tensor) for tensor in tensors}, set(waiting)
    while waiting:
        node = waiting.pop()
        if any(word in node.name() for word in ("Checkpoint", "Reversible")):  # they run parts anew in the backward
            return variables, nodes, False
        if (variable := getattr(node, "variable", None)) is not None:
            variables.add(id(variable))
        new = {following for following, _ in node.next_functions if following is not None} - nodes
        nodes |= new
        waiting += new
    return variables, nodes, True


def _unreached(name: str, where: str) -> Diagnostic:
    message = f"delta {name!r} has no effect in this forward: {where} is part of what the model gives with gradients"
    hint = "detach it, freeze it, or leave the site out; or call the model in a way that uses it"
    return Diagnostic("DS468", message, suggestion=hint)
