"""What PEFT keeps beside the tensors of a type, on the way out: whole modules, biases, rows of single tokens."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable

from torch import Tensor

from deltaspec.backbone.entrances import part_of
from deltaspec.formats.outgoing import Outgoing, Part
from deltaspec.formats.peft.naming import saved_list
from deltaspec.formats.peft.tying import ties_embeddings
from deltaspec.methods.registry import methods
from deltaspec.names.paths import below, is_inside

PREFIX = "base_model.model."
WHOLE = frozenset({"full", "norm"})
"""Methods whose deltas put other tensors in the place of a module's own."""
ROWS = "trainable_tokens"
SHIFTS = "bitfit"
ASIDE = frozenset({*WHOLE, ROWS, SHIFTS})
"""Methods that go beside any type that PEFT has."""


def write_aside(out: Outgoing, type_name: str, *, biases: bool, rows: bool = False) -> dict[str, Tensor]:
    """Take the parts that PEFT keeps beside a type's tensors; `biases`, `rows`: whether it has options for those.

    Return the biases of modules that have none of their own, by FQN: the type may add them, or refuse them.
    """
    added = _shifts(out) if biases else {}
    write_whole(out)  # with the biases and rows of these modules, for which no option is needed
    if not biases:
        _refuse_all(out, SHIFTS, f"PEFT's {type_name} has no option for biases")
    if not rows:
        _refuse_all(out, ROWS, f"PEFT's {type_name} has no trainable_token_indices")
    _rows(out)
    return added


def _refuse_all(out: Outgoing, method: str, reason: str) -> None:
    """Take and refuse all parts of a method that a type has no place for."""
    for parts in out.take(lambda part: part.method == method).values():
        out.refuse(parts, reason)


def write_whole(out: Outgoing, heads: Iterable[str] = ()) -> None:
    """Take the parts in modules that PEFT saves whole; `heads` are those that it saves of this base in any case."""
    _drop_unused(out)
    places = {*(part.fqn for part in out.parts if part.method in WHOLE), *heads}
    tops = [fqn for fqn in places if not any(other != fqn and is_inside(fqn, other) for other in places)]
    found = out.take(lambda part: any(is_inside(part.fqn, top) for top in tops))
    if not tops:
        return
    parts = [part for own in found.values() for part in own]
    if other := [part for part in parts if methods()[part.method].promises.weight is None]:
        out.refuse(other, "PEFT has no adapter on a module that is trained in full")
        return
    if "" in tops:
        out.refuse(parts, "PEFT cannot save the model itself as a module, and some of its own parameters are trained")
        return
    shared = [part for part in parts if part.at.site.row.aliases]
    if shared:
        out.refuse(shared, "PEFT would replace the module under one of its names alone")
        return
    names = [name for name, _ in out.base.model.named_modules(remove_duplicate=False) if name]
    listed = saved_list(tops, names)
    if listed is None or not all(_is_pattern_of(name) for name in listed):
        out.refuse(parts or out.all_parts, "PEFT's modules_to_save cannot mean this module and no other")
        return
    out.config["modules_to_save"] = listed
    for top in tops:
        _copy(out, top, {fqn: own for fqn, own in found.items() if is_inside(fqn, top)})


def _drop_unused(out: Outgoing) -> None:
    """Take the parts that stand for tied places which nothing calls: those that run have the same tensors."""
    running = {part.fqn for part in out.parts} - out.plan.unused

    def is_idle(part: Part) -> bool:
        tied = (twin.rpartition(".")[0] for p in part.at.site.row.parameters for twin in p.tied)
        together = getattr(part.params, "tied", None) == "together"
        return part.method in WHOLE and together and part.fqn not in running and not running.isdisjoint(tied)

    out.take(is_idle)


def _is_pattern_of(name: str) -> bool:
    """Return whether PEFT, which reads these names as regular expressions too, finds this one by itself."""
    try:
        return re.fullmatch(name, name) is not None
    except re.error:
        return False


def _copy(out: Outgoing, top: str, found: dict[str, list[Part]]) -> None:
    """Write all that a module holds: what deltas made of it, and the base's own values of the rest."""
    changed = {
        below(fqn, name): (value, own)
        for fqn, own in found.items()
        for name, value in out.folded(fqn, own).items()
    }  # fmt: skip
    held = out.base.model.get_submodule(top).state_dict(keep_vars=True)
    for name, value in held.items():
        key = below(top, name)
        if key not in changed and value.is_meta:
            own = [part for parts in found.values() for part in parts]
            out.lacks_weights(own or out.all_parts, f"{key} must be written too")
            return
        out.tensors[PREFIX + key] = changed.pop(key)[0] if key in changed else value.detach()
    for key, (_, own) in changed.items():
        out.refuse(own, f"the module has no {key.rpartition('.')[2]} of its own")


def _rows(out: Outgoing) -> None:
    found = out.take(lambda part: part.method == ROWS)
    if not found:
        return
    names = [name for name, _ in out.base.model.named_modules(remove_duplicate=False) if name]
    given = {}
    for fqn, parts in found.items():
        if not _keeps_rows(out, fqn, found):
            continue
        ids = list(dict.fromkeys(i for part in parts for i in part.params.token_ids))
        listed = saved_list([fqn], names)
        if listed is None or (out.config.get("modules_to_save") and fqn in _saved(out)):
            out.refuse(parts, "PEFT's trainable_token_indices cannot mean this module and no other")
            continue
        given[listed[0]] = ids
        plain = len(parts) == 1 and parts[0].strength == 1
        rows = parts[0].own.weight if plain else out.folded(fqn, parts)["weight"][ids]
        out.tensors[f"{PREFIX}{fqn}.token_adapter.trainable_tokens_delta"] = rows
    out.config["trainable_token_indices"] = given
    if ties_embeddings(out.base, unsaid=False):
        _refuse_untied(out, found)


def _keeps_rows(out: Outgoing, fqn: str, places: Collection[str]) -> bool:
    """Return whether PEFT needs rows at a place: it ties others to the input embeddings, and some are never called."""
    row = out.base.rows[fqn]
    tied = {twin.rpartition(".")[0] for p in row.parameters for twin in p.tied}
    if not ties_embeddings(out.base, unsaid=False):
        return tied.isdisjoint(places) or fqn not in out.plan.unused
    table = part_of(out.base.model, "get_input_embeddings")
    return out.base.model.get_submodule(fqn) is table or not any(
        out.base.model.get_submodule(twin) is table for twin in tied if twin in places
    )


def _saved(out: Outgoing) -> set[str]:
    return {key.removeprefix(PREFIX).rpartition(".")[0] for key in out.tensors}


def _refuse_untied(out: Outgoing, found: dict[str, list[Part]]) -> None:
    for own in found.values():
        for part in own:
            if part.params.tied == "alone" and any(p.tied for p in part.at.site.row.parameters):
                reason = "PEFT changes the rows of all that is tied, and this delta those of one place"
                out.refuse([part], reason, f"c.merge({part.delta!r}), or train the rows with tied: together")


def is_bias(part: Part) -> bool:
    """Return whether all that a part changes is a bias."""
    return part.method == SHIFTS or (part.method in WHOLE and {spec.name for spec in part.at.tensors} == {"bias"})


def _shifts(out: Outgoing) -> dict[str, Tensor]:
    """Take the changes of biases; return those of modules without one."""
    whole = {part.fqn for part in out.parts if part.method in WHOLE and not is_bias(part)}
    found = out.take(lambda part: is_bias(part) and not any(is_inside(part.fqn, other) for other in whole))
    added: dict[str, Tensor] = {}
    for fqn, parts in found.items():
        row = parts[0].at.site.row
        if any({spec.name for spec in part.at.tensors} != {"bias"} for part in parts):
            out.refuse(parts, "PEFT has a form for the bias of a module alone, and this one holds several")
        elif not row.has_parameter("bias"):
            if row.kind == "norm":
                out.refuse(parts, f"this {row.type} has no bias, and PEFT adds none to it")
            else:
                added[fqn] = out.folded(fqn, parts)["bias"]
        elif out.base.is_meta:
            out.lacks_weights(parts, "PEFT keeps whole biases")
        elif any(_is_shared(out, part) for part in parts):
            out.refuse(parts, "PEFT changes a tied bias at all of its places")
        else:
            out.tensors[f"{PREFIX}{fqn}.bias"] = out.folded(fqn, parts)["bias"]
            out.config["bias"] = "all"
    return added


def _is_shared(out: Outgoing, part: Part) -> bool:
    """Return whether a bias is tied to that of another layer, and changed here alone."""
    if getattr(part.params, "tied", None) == "together":
        return False
    twins = (twin for p in part.at.site.row.parameters if p.name == "bias" for twin in p.tied)
    return any(out.base.rows[twin.rpartition(".")[0]].kind != "other" for twin in twins)
