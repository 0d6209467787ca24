"""What is known of the deltas of one view: which there are, what they may do together, and what they come from."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from typing import TYPE_CHECKING

import torch

from deltaspec.combination import behind, refresh
from deltaspec.diagnostics import DeltaSpecError, Diagnostic, require_known
from deltaspec.methods import methods
from deltaspec.running.proving import refuse_bypassed

if TYPE_CHECKING:
    from torch import nn

    from deltaspec.deltas import Deltas
    from deltaspec.library.libraries import Libraries
    from deltaspec.planning.observe import Observation
    from deltaspec.planning.planned import Plan, PlannedDelta
    from deltaspec.planning.rivals import Rivals
    from deltaspec.running.programs import Programmer
    from deltaspec.running.switching import Forward


class Known:
    """The part of `Attachments` that attaches nothing."""

    backbone: nn.Module
    deltas: Deltas
    plan: Plan
    planned: dict[str, PlannedDelta]
    order: dict[str, int]
    active: tuple[str, ...]
    libraries: Libraries
    programmer: Programmer
    unproven: set[str]
    _rivals: Rivals
    _derived: frozenset[str]

    @property
    def device(self) -> torch.device:
        """Where the deltas are."""
        return next((tensor.device for tensor in self.deltas.parameters()), torch.device("cpu"))

    def require_known(self, names: Iterable[str]) -> None:
        """Raise UnknownDeltaError, with all findings, for names that no delta has."""
        require_known(names, self.order)

    def require(self, names: Collection[str]) -> None:
        """Have these deltas in memory, loaded if need be. Raises UnknownDeltaError, DeltaSpecError."""
        self.require_known(names)
        self.libraries.require(names)

    def refuse_strengths(self, names: Iterable[str]) -> None:
        """Raise DeltaSpecError (DS446) for those of these deltas that cannot act in part."""
        planned = [self.planned[name] for name in names]
        if findings := [_no_strength(p) for p in planned if methods()[p.method].strength is None]:
            raise DeltaSpecError(findings)

    def refuse_rivals(self, names: Sequence[str]) -> None:
        """Refuse deltas that cannot act at once (DS436); names are in order of application."""
        self._rivals.refuse(names)

    def derive(self, names: Iterable[str]) -> None:
        """Compute those of these deltas that are derived anew, from their sources as they are now."""
        if self._derived:
            refresh(self.backbone, self.deltas, self.plan, [name for name in names if name in self._derived])

    def derive_detached(self) -> None:
        """Compute the derived deltas that are not attached anew."""
        self.derive(name for name in self.order if name not in self.active)

    def behind(self) -> list[str]:
        """Give the names of the attached derived deltas whose sources have changed since they were computed."""
        return behind(self.backbone, self.deltas, self.plan, [name for name in self.active if name in self._derived])

    def original_forward(self, fqn: str) -> Forward | None:
        """Give the instance-level forward that a module of the backbone had before any delta (None: it had none)."""
        return self.programmer.originals.get(fqn)

    def prove_reached(self, seen: dict[str, Observation], names: Iterable[str]) -> None:
        """Refuse, after their first forward, deltas whose modules' weights are read around them (DS437)."""
        names = tuple(names)
        refuse_bypassed(self.programmer, seen, names)
        self.unproven.difference_update(names)

    def require_proof(self) -> None:
        """Refuse to be traced (torch.compile, torch.export) before any forward proved the active sites (DS440)."""
        if not self.unproven.isdisjoint(self.active):
            message = "no forward has shown yet that the attached deltas are reached, and a trace cannot show it"
            hint = "pass example_inputs to deltaspec.compile, or call the model once before torch.compile or export"
            raise DeltaSpecError([Diagnostic("DS440", message, suggestion=hint)])


def _no_strength(planned: PlannedDelta) -> Diagnostic:
    message = f"delta {planned.name!r} has no strength between none and all: {planned.method} adds tokens to the input"
    return Diagnostic("DS446", message, suggestion="attach it at strength 1, or leave it out")
