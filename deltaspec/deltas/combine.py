"""The tensors of derived deltas: weighted sums of low-rank updates, as PEFT's `add_weighted_adapter` defines them.

- `linear` sums the sources' A and their B, each with sqrt(|weight · scale|), the sign on A. That is no sum of the
  updates: products of one source's B with another's A come in.
- `cat` is the sum, its rank that of all sources together; `svd` is the best approximation of it by one rank.
- `ties` (arXiv:2306.01708) is `linear` on each source's largest values, of which those count whose sign won.
- `dare_linear`, `dare_ties` (arXiv:2311.03099) are so on random values, scaled up for those that were dropped.

A derived delta is computed from what its sources' tensors are at that moment: when the model is compiled, at `attach`
and `only` that name it, when a `with` attaches it again, at `load`, at `refresh`, and, while detached, before it is
saved or merged. In between it stays what it is, though its sources are trained; saving it then is an error.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import copysign, sqrt
from typing import Any

import torch
from torch import Tensor, nn

from deltaspec.deltas.initial import seeded
from deltaspec.deltas.modules import Deltas, storage_key
from deltaspec.diagnostics.findings import DeltaSpecError, Diagnostic
from deltaspec.language.derivation import METHOD, Derivation, in_order
from deltaspec.methods.declarations import DeltaTensors
from deltaspec.methods.registry import methods
from deltaspec.methods.shared.weights import canonical
from deltaspec.planning.derived import has_plain_factors
from deltaspec.planning.plan import Plan
from deltaspec.planning.planned import PlannedSite


@dataclass(frozen=True, slots=True)
class Addend:
    """One source at one site."""

    weight: float
    method: str
    planned: PlannedSite
    own: Any
    """Tensors of the source here, as attributes."""

    @property
    def factor(self) -> float:
        """Weight times lora's scale."""
        params: Any = self.planned.params
        return self.weight * float(params.scale)


@torch.no_grad()
def refresh(backbone: nn.Module, deltas: Deltas, plan: Plan, names: Iterable[str]) -> None:
    """Compute derived deltas anew, all before any is changed. On the meta device there is nothing to compute.

    Raises DeltaSpecError (DS520) where a source has NaN or infinite values.
    """
    for name, tensors in derive(backbone, deltas, plan, names).items():
        for key, value in tensors.items():
            own = deltas[name].tensor(key)
            if not torch.equal(own, value.to(own)):  # a write that changes nothing would still break backwards
                own.copy_(value)


def behind(backbone: nn.Module, deltas: Deltas, plan: Plan, names: Iterable[str]) -> list[str]:
    """Return the names of those derived deltas that are not what their sources would give now."""
    found = []
    for name, fresh in derive(backbone, deltas, plan, names).items():
        own = deltas[name]
        if not all(torch.equal(own.tensor(key), value.to(own.tensor(key))) for key, value in fresh.items()):
            found.append(name)
    return found


@torch.no_grad()
def derive(backbone: nn.Module, deltas: Deltas, plan: Plan, names: Iterable[str]) -> dict[str, dict[str, Tensor]]:
    """Return derived deltas' tensors, by name and storage key, as their sources (and those of derived ones) are now."""
    wanted = list(names)
    sources = {d.name: [name for name, _ in d.derived.sources] for d in plan.deltas if d.derived is not None}
    needed, pending = set[str](), list(wanted)
    while pending:
        if (name := pending.pop()) not in needed:
            needed.add(name)
            pending += sources.get(name, ())
    held: dict[str, dict[str, Tensor]] = {}
    for name in in_order({name: sources.get(name, ()) for name in needed}):
        own = dict(deltas[name].tensors())
        if name in sources and not any(value.is_meta for value in own.values()):
            own = _derived(plan, name, held, backbone)
        held[name] = own
    return {name: held[name] for name in wanted if not any(value.is_meta for value in held[name].values())}


def _derived(plan: Plan, name: str, held: Mapping[str, Mapping[str, Tensor]], backbone: nn.Module) -> dict[str, Tensor]:
    """Return one derived delta's tensors, by storage key; `held` has those of its sources."""
    planned = plan[name]
    derivation = planned.derived
    assert derivation is not None
    places = {source: {site.fqn: site for site in plan[source].sites} for source, _ in derivation.sources}
    tensors: dict[str, Tensor] = {}
    for place in planned.sites:
        fqn = place.site.row.fqn
        sources = []
        for source, weight in derivation.sources:
            part = places[source][place.fqn]
            values = [held[source][storage_key(fqn, spec)] for spec in part.tensors]
            own = DeltaTensors(tuple(spec.name for spec in part.tensors), [_wide(value) for value in values])
            sources.append(Addend(weight, plan[source].method, part, own))
        if derivation.combine == "svd":
            down, up = _decomposed(place, sources, backbone.get_submodule(fqn), name)
        else:
            down, up = _combined(derivation, sources, seeded(f"{derivation.params.seed}\0{name}\0{fqn}"))
        for spec in place.tensors:
            tensors[storage_key(fqn, spec)] = (down if spec.name == "down" else up).reshape(spec.shape)
    return tensors


def _combined(derivation: Derivation, sources: list[Addend], generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return A and B of one site; those of a convolution may come flat."""
    downs, ups = [source.own.down for source in sources], [source.own.up for source in sources]
    factors = [source.factor for source in sources]
    if derivation.combine == "cat":
        return torch.cat([down * factor for down, factor in zip(downs, factors, strict=True)]), torch.cat(ups, 1)
    roots = [sqrt(abs(factor)) for factor in factors]
    signed = [copysign(root, factor) for root, factor in zip(roots, factors, strict=True)]
    return _summed(downs, signed, derivation, generator), _summed(ups, roots, derivation, generator)


def _summed(tensors: list[Tensor], weights: list[float], derivation: Derivation, generator: torch.Generator) -> Tensor:
    combine, density = derivation.combine, derivation.params.density
    if density is not None and density < 1 and combine != "linear":
        prune = _largest if combine == "ties" else _some
        tensors = [prune(tensor, density, generator) for tensor in tensors]
    stack = torch.stack(tensors)
    weighted = stack * stack.new_tensor(weights).reshape(-1, *(1,) * (stack.dim() - 1))
    if not combine.endswith("ties"):
        return weighted.sum(0)
    votes = stack if derivation.params.majority_sign == "total" else stack.sign()
    elected = stack.sign() == torch.where(votes.sum(0) >= 0, 1, -1)
    return (weighted * elected).sum(0) / elected.sum(0).clamp(min=1)


def _largest(tensor: Tensor, density: float, generator: torch.Generator) -> Tensor:
    """Keep the values that are largest in magnitude; the others become zero."""
    mask = torch.zeros_like(tensor).reshape(-1)
    mask[tensor.abs().reshape(-1).topk(int(density * tensor.numel())).indices] = 1
    return tensor * mask.reshape(tensor.shape)


def _some(tensor: Tensor, density: float, generator: torch.Generator) -> Tensor:
    """Keep random values, scaled up so that the expectation stays; drawn on the CPU, so that every device agrees."""
    mask = torch.bernoulli(torch.full(tensor.shape, density, dtype=torch.float32, device="cpu"), generator=generator)
    return tensor * mask.to(tensor) / density


def _decomposed(place: PlannedSite, sources: Sequence[Addend], module: nn.Module, name: str) -> tuple[Tensor, Tensor]:
    """Return the best factors of a rank for the weighted sum of the updates."""
    params: Any = place.params
    rank: int = params.rank
    if all(source.method == METHOD and has_plain_factors(source.planned.params) for source in sources):
        # Each update is scale · B A, so the sum has the factors [w B …] and [A; …]: their small cores are decomposed in
        # place of the whole weight.
        left = torch.cat([source.own.up.flatten(1).double() * source.factor for source in sources], 1)
        right = torch.cat([source.own.down.flatten(1).double() for source in sources])
        _require_finite(name, place.fqn, left, right)
        (outer, core), (inner, turned) = torch.linalg.qr(left), torch.linalg.qr(right.t())
        u, s, v = torch.linalg.svd(core @ turned.t(), full_matrices=False)
        u, v = outer @ u, v @ inner.t()
    else:
        whole = torch.stack([source.weight * _update(source, module) for source in sources]).sum(0)
        _require_finite(name, place.fqn, whole)
        u, s, v = torch.linalg.svd(whole, full_matrices=False)
    up, down = (u * s)[:, :rank], v[:rank]
    missing = rank - down.shape[0]  # a sum of lower rank
    return nn.functional.pad(down, (0, 0, 0, missing)), nn.functional.pad(up, (0, missing))


def _update(source: Addend, module: nn.Module) -> Tensor:
    """Return one source's change of the weight, `[out, in · kernel]`; in float64, as a difference of large numbers."""
    planned = source.planned
    weights = {name: value.double() for name, value in module._parameters.items() if value is not None}
    names = tuple(spec.name for spec in planned.tensors)
    values = [getattr(source.own, name) for name in names]
    own = DeltaTensors(names, [value.double() if value.is_floating_point() else value for value in values])
    folded = methods()[source.method].fold(planned.site, planned.params, own, weights)["weight"]
    update: Tensor = canonical(planned.site.kind, folded - weights["weight"])
    return update.flatten(1).float()


def _require_finite(name: str, fqn: str, *values: Tensor) -> None:
    if not all(bool(torch.isfinite(value).all()) for value in values):
        message = f"{name}: the sources of {fqn} have NaN or infinite values"
        hint = "the training diverged: go back to an earlier state"
        raise DeltaSpecError([Diagnostic("DS520", message, file="<model>", suggestion=hint)])


def _wide(value: Tensor) -> Tensor:
    """Widen half precision: the decompositions have no form there."""
    return value.float() if value.dtype in (torch.float16, torch.bfloat16) else value
