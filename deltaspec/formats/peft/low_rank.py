"""What deltas add to modules as one low-rank update each: exact where their methods are low-rank, else the closest."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

from torch import Tensor

from deltaspec.formats.outgoing import Outgoing, Part
from deltaspec.formats.peft.aside import PREFIX, write_aside
from deltaspec.formats.peft.closest import closest_update
from deltaspec.formats.peft.convolutions import ignored_dilation
from deltaspec.formats.peft.factors import Update, joined, ungrouped
from deltaspec.formats.peft.lora_form import with_bias, write_lora
from deltaspec.formats.peft.parameters_out import older_names, untargetable, updates_at
from deltaspec.formats.peft.single import LAYERS, left_out, unknown_layer, unplaced
from deltaspec.names.paths import below

Updates = Callable[[Part], Iterable[Update]]
"""What a delta of a method adds at one place."""


def write_updates(out: Outgoing, known: Mapping[str, Updates]) -> None:
    """Write one LoRA; `known` are the methods that are low-rank themselves."""
    added = write_aside(out, "LORA", biases=True, rows=True)
    rank = out.wishes.approximate
    taken = out.take(lambda part: part.method in known or (rank is not None and part.is_weight))
    found: dict[str, list[Part]] = {}
    for part in (part for own in taken.values() for part in own):
        found.setdefault(part.at.fqn, []).append(part)
    modules: dict[str, Update] = {}
    parameters: dict[str, Update] = {}
    for name, parts in found.items():
        if reason := _unplaced(out, parts):
            out.refuse(parts, reason)
            continue
        updates = modules if parts[0].parameter is None else parameters
        reason = _inexact(parts, known, dora=out.wishes.dora)
        if reason is None:
            row = parts[0].at.site.row
            made = [ungrouped(update, row) for part in parts for update in updates_at(part, known[part.method])]
            updates[name] = joined(made, row.conv_groups)
        elif rank is None:
            out.refuse(parts, reason)
        elif (close := closest_update(out, parts, rank)) is not None:
            updates[name] = close.update
            out.errors[name] = close.error
            _shift(out, name, close.bias, added)
    for fqn, bias in added.items():
        if fqn not in found and (reason := _unplaced(out, out.at(fqn))):
            out.refuse(out.at(fqn), reason)
            continue
        modules[fqn] = with_bias(modules.get(fqn), bias, out.base.rows[fqn])
    _as_parameters(out, modules, parameters)
    out.settle()
    write_lora(out, modules, parameters, dropout=_dropout(out, found, alone=not parameters))


def _as_parameters(out: Outgoing, modules: dict[str, Update], parameters: dict[str, Update]) -> None:
    """Write layers that PEFT would take for others by their names as the parameters that they have."""
    older = older_names(out)
    for fqn in [fqn for fqn in modules if fqn.rpartition(".")[2] in older]:
        update = modules[fqn]
        if update.magnitude is not None or update.bias is not None:
            what = "DoRA" if update.magnitude is not None else "learned bias"
            out.refuse(out.at(fqn), f"PEFT takes this name for that of experts, and has no {what} for a parameter")
        elif out.wishes.listed:
            out.refuse(out.at(fqn), "PEFT takes this name for that of experts, and engines take no target_parameters")
        else:
            parameters[below(fqn, "weight")] = modules.pop(fqn)


def _dropout(out: Outgoing, found: Mapping[str, list[Part]], *, alone: bool) -> float:
    """Return the one dropout that PEFT has for all modules, the largest; `alone`: no parameter is changed besides."""
    there = {float(getattr(part.params, "dropout", 0.0)) for parts in found.values() for part in parts}
    if not alone:
        if there - {0.0}:
            out.remarks.append(f"dropout (up to {max(there):g}) is left out: PEFT has none beside target_parameters")
        return 0.0
    if len(there - {0.0}) > 1:
        out.remarks.append(f"dropouts differ between modules (up to {max(there):g}): PEFT has one")
    return max(there, default=0.0)


def _unplaced(out: Outgoing, parts: Sequence[Part]) -> str | None:
    """Return why PEFT's LoRA does not act at a place; None where it does."""
    if parts[0].parameter is not None:
        return untargetable(out, parts[0])
    for part in parts:
        if reason := unplaced(out, part) or unknown_layer(out, part, (*LAYERS, "Conv1D"), "LoRA"):
            return reason
        if reason := left_out(ignored_dilation(out.base.model.get_submodule(part.fqn))):
            return reason
    return None


def _inexact(parts: list[Part], known: Mapping[str, Updates], *, dora: bool) -> str | None:
    """Return why these parts are no sum of low-rank updates; None where they are."""
    if other := [part.method for part in parts if part.method not in known]:
        return f"{other[0]} is no low-rank update"
    decomposed = [part for part in parts if getattr(part.params, "use_dora", False)]
    if parts[0].parameter is not None and (decomposed or any(getattr(part.params, "bias", False) for part in parts)):
        return f"PEFT's target_parameters have no {'DoRA' if decomposed else 'learned bias'}"
    if not decomposed:
        return None
    if not dora:
        return "DoRA is not what the engine computes"
    if len(parts) > 1:
        return "PEFT's DoRA stands alone on a module, and several deltas are added here"
    if parts[0].strength != 1:
        return f"DoRA at strength {parts[0].strength:g} is no DoRA"
    return "PEFT's DoRA has no place for a start that is subtracted" if parts[0].params.keeps_start else None


def _shift(out: Outgoing, fqn: str, bias: Tensor | None, added: dict[str, Tensor]) -> None:
    """Write what an approximated delta made of a bias: the module's own, or one that LoRA adds."""
    if bias is None:
        return
    if not out.base.rows[fqn].has_parameter("bias"):
        added[fqn] = bias + added.get(fqn, 0)
        return
    written = out.tensors.get(f"{PREFIX}{fqn}.bias")
    out.tensors[f"{PREFIX}{fqn}.bias"] = bias if written is None else written + bias - out.base_values(fqn)["bias"]
    out.config["bias"] = "all"
