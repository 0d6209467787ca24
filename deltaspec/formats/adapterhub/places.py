"""Where AdapterHub puts things in an architecture, and what is there: a table of data, applied to a model.

`places.json` has, by model type: `stacks` of layers with what prefixes on their attention are called; `bottlenecks`
with the key in files, the projection whose output they see, the norm behind the residual sum (architectures that
normalise after it), the module that gives that sum and the one that goes from the residual stream to it, where there
are such, else (`stream`) one that the residual stream enters; `embeddings`, what gives what enters the first layer;
`linears` by AdapterHub's names; and `attentions` with what their prefixes are called where that is not the stack's.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

from deltaspec.backbone.table import ModuleTable
from deltaspec.names.paths import below

_ALIKE = {"roberta": "bert", "xlm-roberta": "bert", "electra": "bert", "mistral": "llama", "mt5": "t5"}
"""Model types whose modules are called as those of another."""


@dataclass(frozen=True, slots=True)
class Place:
    """One place for a bottleneck. All names are FQNs."""

    location: str
    """`mh` behind attention, `cross` behind cross-attention, `output` behind the feed-forward."""
    layer: int
    """Number of its layer; a decoder's count on after the encoder's."""
    projection: str
    norm: str | None
    sum: str | None
    around: str | None
    stream: str
    """Path, in its layer, of a module that the residual stream enters."""


@dataclass(frozen=True, slots=True)
class Places:
    """All places of one model."""

    bottlenecks: Mapping[str, Place]
    """By the name that files call each, as it would be in this model."""
    linears: Mapping[str, tuple[str, int]]
    """Linear layers by FQN, with AdapterHub's name (q, k, v, qkv, intermediate, output) and layer."""
    attentions: Mapping[str, tuple[str, int]]
    """Attention modules by FQN, with the name of their prefixes (self, encoder, cross) and layer."""
    layers: Mapping[str, int]
    """Layers by FQN, with their numbers."""
    embeddings: str | None
    """FQN of the module that gives what enters the first layer; None where AdapterHub changes nothing there."""


def places_of(table: ModuleTable) -> Places | None:
    """Return the places of a model; None where its architecture is not known here."""
    kind = table.model_type or ""
    data = _data().get(_ALIKE.get(kind, kind))
    if data is None:
        return None
    names = {row.fqn for row in table.rows}
    layers: dict[str, tuple[int, str]] = {}
    for stack, called in data["stacks"].items():
        pattern = re.compile(rf"(?:.*\.)?{re.escape(stack)}\.\d+")
        for fqn in (row.fqn for row in table.rows if pattern.fullmatch(row.fqn)):
            layers[fqn] = (len(layers), called)
    bottlenecks: dict[str, Place] = {}
    linears: dict[str, tuple[str, int]] = {}
    attentions: dict[str, tuple[str, int]] = {}
    for layer, (number, called) in layers.items():
        for place in data["bottlenecks"]:
            if below(layer, place["projection"]) in names:
                found = {key: _inside(layer, place.get(key)) for key in ("norm", "sum", "around")}
                projection = below(layer, place["projection"])
                stream = place.get("stream", "")
                bottlenecks[below(layer, place["key"])] = Place(
                    place["location"], number, projection, stream=stream, **found
                )
        for name, paths in data["linears"].items():
            linears |= {below(layer, p): (name, number) for p in paths if below(layer, p) in names}
        for path, name in data["attentions"].items():
            if below(layer, path) in names:
                attentions[below(layer, path)] = (name or called, number)
    embeds = [n for n in names if (f".{n}").endswith(f".{data['embeddings']}")] if "embeddings" in data else []
    numbers = {fqn: number for fqn, (number, _) in layers.items()}
    return Places(bottlenecks, linears, attentions, numbers, embeds[0] if len(embeds) == 1 else None)


def _inside(layer: str, path: str | None) -> str | None:
    return None if path is None else below(layer, path) if path else layer


@cache
def _data() -> dict[str, Any]:
    return dict(json.loads(files(__package__).joinpath("places.json").read_text("utf-8")))
