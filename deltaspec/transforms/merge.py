"""Merging: a plain model of the original class, with weight-expressible deltas folded into its weights."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from deltaspec.backbone.clone import norm_limited
from deltaspec.backbone.copying import deep_copy
from deltaspec.backbone.forwards import names_in
from deltaspec.backbone.offload import is_elsewhere, put
from deltaspec.backbone.unpacking import copies_of_codes, tell_unpacked, unpacked
from deltaspec.backbone.weight_forms import is_packed, own_values
from deltaspec.deltas.finite import is_finite, not_finite
from deltaspec.deltas.modules import storage_key
from deltaspec.diagnostics.findings import DeltaSpecError, Diagnostic
from deltaspec.methods.declarations import DeltaTensors
from deltaspec.methods.registry import methods
from deltaspec.names.paths import below
from deltaspec.planning.planned import PlannedDelta, PlannedSite
from deltaspec.runtime.active import Active
from deltaspec.runtime.copies import without_deltas
from deltaspec.runtime.host import Host
from deltaspec.runtime.lowering import Fold, fold_widely, rounded
from deltaspec.runtime.misfits import refuse_misfits
from deltaspec.runtime.shared import Shared
from deltaspec.runtime.unplaced import refuse_meta

_TIED = "tie_word_embeddings"


@torch.no_grad()
def merge(active: Active, shared: Shared, host: Host, names: Collection[str]) -> nn.Module:
    """Return a new plain model with these deltas folded in; it shares no storage with the backbone.

    Weights are folded in float32 where the delta is float32, and rounded once. Tied parameters that a delta changes at
    one end only are untied in the result. Raises DeltaSpecError (DS435) where a delta cannot be expressed in weights,
    (DS436) where two exclude each other, (DS520) where a delta or a merged weight has NaN or infinite values, (DS417)
    where there is none to fold in, and the backbone cannot have changed.
    """
    if not names and not host.trained:
        message, hint = "nothing is attached, so nothing would be merged", "attach deltas first, or name them"
        raise DeltaSpecError([Diagnostic("DS417", message, file="<model>", suggestion=hint)])
    names = tuple(sorted(set(names), key=shared.order.__getitem__))
    active.require(names)
    active.follow_others()
    refuse_misfits(host, (shared.planned[name] for name in names), merged=True)
    refuse_meta(host.deltas, names, "merged")
    refuse_unmergeable([shared.planned[name] for name in names], host.backbone)
    shared.rivals.refuse(names)
    strengths = active.strengths.as_dict(names)
    active.derived.refresh(name for name in names if name not in active.active)
    _require_finite(host, names)
    training = host.trained_in_backbone()
    bare = without_deltas(host)
    plain = deep_copy(bare, copies_of_codes(bare))
    copies: dict[tuple[str, ...], list[nn.Parameter]] = {}
    ties: list[tuple[str, str]] = []
    for fqn, deltas in by_module(shared.planned[name] for name in names).items():
        module, row = plain.get_submodule(fqn), deltas[0][1].site.row
        folded = fold_all(module, deltas, lambda name, key: host.deltas[name].tensor(key), strengths)
        values = rounded(module, folded)
        require_as_finite(fqn, module, values)
        if is_packed(module) and "weight" in values:
            _unpack(plain, module, values)
            continue
        for name, value in values.items():
            places = next((tuple(sorted((p.fqn, *p.tied))) for p in row.parameters if p.name == name and p.tied), ())
            _put(module, name, value, copies.setdefault(places, []) if places else [])
            ties += [(fqn, name)] if places else []
    for fqn, name in ties:
        _mark_untied(plain, fqn, name)
    for name, parameter in plain.named_parameters():
        parameter.requires_grad = parameter.requires_grad or name in training
    return plain


def by_module(deltas: Iterable[PlannedDelta]) -> dict[str, list[tuple[PlannedDelta, PlannedSite]]]:
    """Return what changes each module, by its FQN: deltas in order of application, each with its site there."""
    changes: dict[str, list[tuple[PlannedDelta, PlannedSite]]] = {}
    for delta in deltas:
        for planned in delta.sites:
            changes.setdefault(planned.site.row.fqn, []).append((delta, planned))
    return changes


def fold_all(
    module: nn.Module,
    deltas: Iterable[tuple[PlannedDelta, PlannedSite]],
    tensor: Callable[[str, str], Tensor],
    strengths: Mapping[str, float],
) -> dict[str, Tensor]:
    """Return what deltas make of a module's own parameters, by name, not rounded yet.

    `tensor` gives one of a delta by the delta's name and its storage key; a strength that is not named is 1.
    """
    folded: dict[str, Tensor] = {}
    for delta, planned in deltas:
        names = tuple(spec.name for spec in planned.tensors)
        fqn = planned.site.row.fqn
        own = DeltaTensors(names, [tensor(delta.name, storage_key(fqn, spec)) for spec in planned.tensors])
        fold = Fold((), methods()[delta.method], planned.params, planned.site, names)
        strength = torch.tensor(strengths[delta.name], device="cpu") if delta.name in strengths else None
        folded |= fold_widely(module, fold, own, folded, strength)
    return folded


def _require_finite(host: Host, names: Collection[str]) -> None:
    findings = [
        not_finite(name, key)
        for name in names
        for key, value in host.deltas[name].tensors()
        if not value.is_meta and not is_finite(value)
    ]
    if findings:
        raise DeltaSpecError(findings)


def require_as_finite(fqn: str, module: nn.Module, merged: dict[str, Tensor]) -> None:
    """Raise DeltaSpecError (DS520) where a merged tensor is not finite, though the module's own is."""
    for name, value in merged.items():
        own = module._parameters.get(name)
        if value.is_meta or is_finite(value) or not (own is None or is_finite(own)):
            continue
        message = f"{below(fqn, name)} would have NaN or infinite values, in {str(value.dtype).removeprefix('torch.')}"
        hint = "merge into a model of a wider dtype: load the backbone in float32, or bfloat16"
        raise DeltaSpecError([Diagnostic("DS520", message, file="<model>", suggestion=hint)])


def _unpack(plain: nn.Module, module: nn.Module, folded: dict[str, Tensor]) -> None:
    """Put a module of plain values in the place of one that keeps codes; folded ones would not survive rounding."""
    twin = unpacked(module, own_values(module) | folded)
    for parent in plain.modules():
        for name, child in parent._modules.items():
            if child is module:
                parent._modules[name] = twin
    tell_unpacked(plain)


def _put(module: nn.Module, name: str, value: Tensor, copies: list[nn.Parameter]) -> None:
    """Set an own tensor of a module; equal values at places that were tied become one parameter again.

    `copies`: what was put there before.
    """
    if name in module._buffers:
        module._buffers[name] = value.detach().clone()
        return
    if is_elsewhere(module):
        put(module, name, value.detach().clone())
        return
    before = module._parameters[name]
    trained = before is None or before.requires_grad
    made = next((copy for copy in copies if copy.dtype == value.dtype and torch.equal(copy, value)), None)
    if made is None:
        made = nn.Parameter(value.detach().clone(), requires_grad=trained)
        copies.append(made)
    module._parameters[name] = made


def _mark_untied(plain: nn.Module, fqn: str, name: str) -> None:
    """Tell transformers not to tie again, where one end of a tie now has weights of its own.

    Some forwards (UMT5, Switch Transformers) scale what enters the head where the config says that it is tied: there
    the config stays as it is. Loading ties no weights that differ, whatever it says.
    """
    changed = plain.get_submodule(fqn)._parameters[name]
    places = [p for p in plain.named_parameters(remove_duplicate=False) if p[1] is changed]
    config = getattr(plain, "config", None)
    if len(places) == 1 and config is not None and getattr(config, _TIED, False):
        if not reads_ties(plain):
            config.tie_word_embeddings = False
        _untie(plain)


def reads_ties(model: nn.Module) -> bool:
    """Return whether some forward of a model asks the config whether weights are tied, and computes by that."""
    return any(_TIED in names_in(type(module).forward) for module in model.modules())


def _untie(plain: nn.Module) -> None:
    """Give every place of a tied parameter its own copy: transformers ties all of a model it loads, or nothing."""
    seen: set[int] = set()
    for module in plain.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and id(parameter) in seen:
                copied = nn.Parameter(parameter.detach().clone(), requires_grad=parameter.requires_grad)
                module._parameters[name] = copied
            seen.add(id(parameter))


def refuse_unmergeable(deltas: Sequence[PlannedDelta], backbone: nn.Module) -> None:
    """Raise DeltaSpecError (DS435) for deltas that weights cannot say, or that have no place in those of a backbone."""
    findings, names = [], [delta.name for delta in deltas]
    for delta in deltas:
        reason, way = "", ""
        if methods()[delta.method].promises.weight is None:
            reason = f"{delta.method} is not expressible in weights"
        for planned in () if reason else delta.sites:
            reason, way = _no_place(backbone.get_submodule(planned.site.row.fqn), delta.method, planned)
            if reason:
                break
        if reason:
            rest = [n for n in names if n != delta.name]
            hint = f"merge the others: c.merge({', '.join(map(repr, rest))})" if rest else "keep it attached instead"
            findings.append(Diagnostic("DS435", f"{delta.name!r} cannot be merged: {reason}", suggestion=hint + way))
    if findings:
        raise DeltaSpecError(findings)


def _no_place(module: nn.Module, method: str, planned: PlannedSite) -> tuple[str, str]:
    """Return why a module has no place for what a delta makes of its parameters, and another way; empty: it has one."""
    if reason := methods()[method].unmergeable(planned.site, planned.params):
        return f"{reason} ({planned.fqn})", ""
    row, changed = planned.site.row, {spec.name for spec in planned.tensors}
    if row.kind in ("linear", "conv1d", "embedding", "conv") and not row.has_parameter("weight"):
        reason = f"the weight of {planned.fqn} ({row.type}) is computed, not a parameter"
        return reason, ", or compile after taking off what computes it (a norm, a mask, a parametrisation)"
    if row.packed is not None and not row.packed.readable and changed != {"bias"}:
        reason = f"only its class can read the {row.packed.name} codes of {planned.fqn} ({row.type})"
        return reason, ", or restore it onto the model without quantisation, and merge it there"
    if "bias" in changed and "bias" not in module._parameters:
        return f"{planned.fqn} ({row.type}) has no place for a bias", ""
    if norm_limited(module) and not methods()[method].folds(planned.site, planned.params):
        return f"{planned.fqn} ({row.type}) limits its rows to a norm: longer ones have no place in it", ""
    return "", ""
