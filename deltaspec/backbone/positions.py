"""Where a transformers model is told positions of tokens: the modules whose forwards are given them.

Models differ in who numbers tokens (columns, the mask, the length of the cache), but what they make of the numbers
stands in few places: an embedding of positions, a rotary embedding, a bias by distance that attention modules compute;
or the model looks them up by itself, and then takes `position_ids` and otherwise counts columns behind its cache.
"""

from __future__ import annotations

import re
import sys
from typing import Any

from torch import nn

from deltaspec.backbone.attention import is_routable, makes_bias
from deltaspec.backbone.forwards import arguments_of, names_in
from deltaspec.backbone.table import Positions
from deltaspec.names.paths import is_inside

PAST = "past_key_values_length"
"""Name under which an embedding of positions is told how many tokens came before those that it numbers itself."""
NUMBERS = "position_ids"
_CROSS = re.compile(r"cross|enc(oder)?_?(dec(oder)?)?_?att", re.IGNORECASE)


def positions(modules: list[tuple[str, nn.Module]]) -> dict[int, Positions]:
    """Find where positions are told among a model's named modules, by `id` of the module that attends to tokens.

    Empty for models that are not transformers'.
    """
    kind = getattr(sys.modules.get("transformers.modeling_utils"), "PreTrainedModel", None)
    if kind is None:
        return {}
    taking = [(f, m) for f, m in modules if isinstance(m, kind) and {"input_ids", "attention_mask"} <= _names(m)]
    told: dict[str, Positions] = {}
    found: dict[int, Positions] = {}
    for fqn, module in modules:
        if "config" not in module.__dict__ or not is_routable(module):
            continue
        around = [(place, model) for place, model in taking if is_inside(fqn, place)]
        if not around:
            continue
        place, model = max(around, key=lambda pair: len(pair[0]))
        if _is_cross(fqn, module):
            found[id(module)] = Positions(place, problem="it attends to what an encoder gives")
            continue
        if place not in told:
            told[place] = _told(place, model, [(f, m) for f, m in modules if m is not model and is_inside(f, place)])
        found[id(module)] = told[place]
    return found


def _told(place: str, model: Any, inside: list[tuple[str, nn.Module]]) -> Positions:
    """Find the modules of one model that are given positions."""
    config = getattr(model, "config", None)
    places = getattr(config, "max_position_embeddings", None)
    places = places if isinstance(places, int) and places > 0 else None
    if getattr(config, "attention_chunk_size", None):
        return Positions(place, problem=f"{type(model).__name__} attends to chunks of its tokens")
    attending = [(f, m) for f, m in inside if "config" in m.__dict__ and is_routable(m)]
    if any(makes_bias(module) for _, module in attending):
        return Positions(place, together=tuple(f for f, m in attending if not _is_cross(f, m)))
    if tables := tuple(fqn for fqn, module in inside if PAST in _names(module)):
        return Positions(place, tables, places=places)
    known = {id(module) for _, module in attending}
    rotary = [f for f, m in inside if not m._modules and NUMBERS in _names(m) and id(m) not in known]
    if rotary:
        return Positions(place, tuple(rotary))
    if NUMBERS in _names(model) and "arange" in names_in(type(model).forward):
        return Positions(place, (place,), places=places)
    return Positions(place, problem=f"{type(model).__name__} is told no positions of its tokens from outside")


def _is_cross(fqn: str, module: nn.Module) -> bool:
    """Return whether a module attends to what an encoder gives; names say so where nothing else does."""
    if getattr(module, "is_cross_attention", False) is True:
        return True
    return any(_CROSS.search(name) for name in (type(module).__name__, *fqn.split(".")[-2:]))


def _names(module: nn.Module) -> set[str]:
    return {parameter.name for parameter in arguments_of(type(module).forward)}
