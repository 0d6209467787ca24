"""What is to be written for another library: deltas at their places, taken one by one; what is left over is refused."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from deltaspec.backbone.sharded import unsharded
from deltaspec.backbone.weight_forms import own_values
from deltaspec.deltas.finite import is_finite, not_finite
from deltaspec.deltas.modules import storage_key
from deltaspec.diagnostics.findings import DeltaSpecError, Diagnostic
from deltaspec.formats.base import Base
from deltaspec.methods.declarations import DeltaTensors
from deltaspec.methods.registry import methods
from deltaspec.names.folding import shown
from deltaspec.planning.plan import Plan
from deltaspec.planning.planned import PlannedDelta, PlannedSite
from deltaspec.runtime.lowering import Fold, fold_widely
from deltaspec.storage.saved import without_values

NEEDS_WEIGHTS = "DS564"
"""Code of what follows from the base's weights, where the base at hand has none."""


@dataclass(frozen=True, slots=True)
class Part:
    """What one delta has at one place."""

    delta: str
    method: str
    at: PlannedSite
    own: Any
    """Its tensors, as attributes."""
    strength: float

    @property
    def is_weight(self) -> bool:
        """Whether it can be expressed as a change of the module's own parameters."""
        return methods()[self.method].promises.weight is not None

    @property
    def params(self) -> Any:
        """Parameters of the method here."""
        return self.at.params

    @property
    def fqn(self) -> str:
        """FQN of the module."""
        return self.at.site.row.fqn

    @property
    def parameter(self) -> str | None:
        """Own name of the parameter, where that is the place and not its module."""
        return self.at.site.parameter


@dataclass(frozen=True, slots=True)
class Wishes:
    """How a form is to be written, where there is a choice."""

    uniform: bool = False
    """One rank and one scale for all modules, for readers that know no patterns."""
    low_rank: bool = False
    """LoRA alone, for readers that know no other method."""
    dora: bool = True
    """Whether DoRA may be written."""
    rslora: bool = True
    """Whether a factor may be over the root of the rank."""
    listed: bool = False
    """Modules named in a list, for readers that take no regular expression."""
    single: bool = False
    """All tensors in float32."""
    approximate: int | None = None
    """Rank of the updates that stand for what has no exact form."""


@dataclass(slots=True)
class Outgoing:
    """Deltas on their way out: a writer takes parts, and adds what it makes of them."""

    base: Base
    plan: Plan
    """Plan of all that goes out, and of what it is derived from."""
    parts: list[Part]
    """What no writer has taken yet, in order of application."""
    strengths: Mapping[str, float]
    """Strength of each delta, in order of application."""
    wishes: Wishes = Wishes()
    config: dict[str, Any] = field(default_factory=dict)
    tensors: dict[str, Tensor] = field(default_factory=dict)
    remarks: list[str] = field(default_factory=list)
    """What the reader of the result must know."""
    named: tuple[str | None, str | None] | None = None
    """What the base is called and its revision, where the model at hand does not say it itself."""
    label: str = ""
    """What was written, for people: `PEFT lora`."""
    errors: dict[str, float] = field(default_factory=dict)
    """Relative error of each module whose change was approximated, by FQN."""
    all_parts: tuple[Part, ...] = field(init=False)
    """All that goes out."""
    _refused: dict[tuple[str, str, str, str], dict[str, None]] = field(default_factory=dict)
    """Places by code, delta, reason and way out."""

    def __post_init__(self) -> None:
        self.all_parts = tuple(self.parts)

    def at(self, fqn: str) -> list[Part]:
        """Return all parts at a module, taken or not, in order of application."""
        return [part for part in self.all_parts if part.fqn == fqn]

    def take(self, wanted: Callable[[Part], bool]) -> dict[str, list[Part]]:
        """Take parts out, by the FQNs of their modules, in order."""
        found: dict[str, list[Part]] = {}
        left = []
        for part in self.parts:
            if wanted(part):
                found.setdefault(part.fqn, []).append(part)
            else:
                left.append(part)
        self.parts = left
        return found

    def refuse(self, parts: Iterable[Part], reason: str, hint: str | None = None, code: str = "DS560") -> None:
        """Say that these parts have no form in what is written."""
        for part in parts:
            places = self._refused.setdefault((code, part.delta, reason, hint or self.way_out(part.delta)), {})
            places[part.at.fqn] = None

    def lacks_weights(self, parts: Iterable[Part], reason: str) -> None:
        """Say that what is written of these parts follows from the base's weights, and that there are none."""
        hint = "name a base with weights: a directory that holds them, or a hub id"
        self.refuse(parts, f"{reason}, and the base has no values here", hint, NEEDS_WEIGHTS)

    def way_out(self, name: str) -> str:
        """Return what can be done with a delta that has no form there."""
        if methods()[self.plan[name].method].promises.weight is None:
            return "leave it out, or serve it with deltaspec itself"
        ways = f"c.merge({name!r}) gives a plain model that has it in its weights"
        return ways if self.wishes.approximate else f"{ways}; approximate=RANK (--approximate RANK) a LoRA close to it"

    def settle(self) -> None:
        """Raise DeltaSpecError where anything was refused."""
        findings = [
            Diagnostic(code, f"{name}: {reason} ({shown(places)})", file="<model>", suggestion=hint)
            for (code, name, reason, hint), places in self._refused.items()
        ]
        if findings:
            raise DeltaSpecError(findings)

    @torch.no_grad()
    def folded(self, fqn: str, parts: Iterable[Part]) -> dict[str, Tensor]:
        """Return what these parts make of a module's own parameters, one after the other, in the widest dtype."""
        module = self.base.model.get_submodule(fqn)
        values: dict[str, Tensor] = {}
        for part in parts:
            names = tuple(spec.name for spec in part.at.tensors)
            fold = Fold((), methods()[part.method], part.params, part.at.site, names)
            strength = None if part.strength == 1 else torch.tensor(part.strength)
            values |= fold_widely(module, fold, part.own, values, strength)
        return values

    def base_values(self, fqn: str) -> dict[str, Tensor]:
        """Return a module's own parameters as they are without deltas, by own name."""
        return own_values(self.base.model.get_submodule(fqn))


def outgoing(
    base: Base,
    plan: Plan,
    planned: Iterable[PlannedDelta],
    tensor: Callable[[str, str], Tensor],
    strengths: Mapping[str, float],
    wishes: Wishes,
) -> Outgoing:
    """Collect deltas for a writer; `tensor` gives one by its delta's name and its storage key.

    Raises DeltaSpecError where they have no values (DS534), or such as are not finite (DS520).
    """
    parts = []
    held: dict[tuple[str, str], Tensor] = {}
    chosen = list(planned)
    for delta in chosen:
        for at in delta.sites:
            names = tuple(spec.name for spec in at.tensors)
            keys = [(delta.name, storage_key(at.site.row.fqn, spec)) for spec in at.tensors]
            for key in keys:
                if key not in held:
                    held[key] = unsharded(tensor(*key).detach()).cpu()
            own = DeltaTensors(names, [held[key] for key in keys])
            parts.append(Part(delta.name, delta.method, at, own, strengths.get(delta.name, 1.0)))
    empty = dict.fromkeys(delta for (delta, _), value in held.items() if value.is_meta)
    findings = [without_values(name, "written for another library") for name in empty]
    findings += [not_finite(*key) for key, value in held.items() if not value.is_meta and not is_finite(value)]
    if findings:
        raise DeltaSpecError(findings)
    given = {delta.name: strengths.get(delta.name, 1.0) for delta in chosen}
    return Outgoing(base, plan, parts, given, wishes)
