"""Our saved deltas as the adapters that an export to PEFT would make of them: configurations and headers alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from math import sqrt
from pathlib import Path
from typing import Any

from deltaspec.diagnostics.findings import DeltaSpecError, Diagnostic
from deltaspec.documents.document import Document
from deltaspec.engines.adapters import Adapter
from deltaspec.engines.base import Base
from deltaspec.engines.keys import PREFIX
from deltaspec.formats.unread import Header, Unread
from deltaspec.language.checks.translation import peft_name
from deltaspec.language.derivation import METHOD
from deltaspec.names.folding import unfold
from deltaspec.storage.saved import SavedSet

_UNREADABLE = (ValueError, KeyError, TypeError, AttributeError, RecursionError)


@dataclass(frozen=True, slots=True)
class _Place:
    """One site of a saved lora, as PEFT would have it."""

    module: str
    shapes: dict[str, tuple[int, ...]]
    """Shapes by the end of a key: `lora_A.weight`."""
    rank: int
    alpha: float
    parameter: str | None = None
    """Own name of the parameter that it changes, where that is a stack of matrices."""


def read_saved(folder: Path, base: Base) -> list[Adapter]:
    """Read the deltas of a saved set, their locks and headers alone. Raises DeltaSpecError with all findings."""
    saved = SavedSet(folder)
    found: list[Adapter] = []
    findings: list[Diagnostic] = []
    for name in saved.names:
        try:
            found.append(_adapter(saved, name, saved.locked(name)["deltas"][name], base))
        except DeltaSpecError as error:
            findings += error.diagnostics
        except _UNREADABLE as error:
            findings.append(saved.no_lock(name, error))
    if findings:
        raise DeltaSpecError(findings)
    return found


def _adapter(saved: SavedSet, name: str, content: dict[str, Any], base: Base) -> Adapter:
    file = saved.folder / saved.entry[name]["file"]
    stored = Unread(file.parent).headers(file.name)
    method = content["method"]
    config: dict[str, Any] = {"peft_type": peft_name(method)}
    tensors: dict[str, Header] = {}
    if method == METHOD:
        params = content["params"]
        places = [place for group in content["groups"] for place in _places(group, params, base)]
        dtype = next(iter(stored.values())).dtype if stored else "F32"
        ends = ((place.module, end, shape) for place in places for end, shape in place.shapes.items())
        tensors = {f"{PREFIX}{module}.{end}": Header(shape, dtype) for module, end, shape in ends}
        config |= _configuration(places, params)
    elif method in _BESIDE:
        config = {"peft_type": "LORA", **_usual(), **_BESIDE[method](content["groups"])}
        tensors = {f"{PREFIX}{key}": header for key, header in stored.items()}
    sites = tuple(site for group in content["groups"] for site in unfold(group["at"]))
    return Adapter(Document(config, str(file)), tensors, str(file), saved.folder, name, method, sites)


def _usual() -> dict[str, Any]:
    """Return what stands in every configuration of LoRA, also where it updates nothing."""
    return {"r": 8, "lora_alpha": 8, "target_modules": []}


def _saved(groups: list[Mapping[str, Any]]) -> dict[str, Any]:
    sites = [site for group in groups for site in unfold(group["at"])]
    return {"modules_to_save": list(dict.fromkeys(site.rpartition(".")[2] for site in sites))}


_BESIDE: Mapping[str, Callable[[list[Mapping[str, Any]]], dict[str, Any]]] = {
    "full": _saved,
    "bitfit": lambda _: {"bias": "all"},
}
"""Methods whose tensors PEFT keeps beside a LoRA, and what its configuration says then."""


def _configuration(places: list[_Place], params: Mapping[str, Any]) -> dict[str, Any]:
    """Return the configuration that says what each place has: the most frequent rank and alpha, and patterns."""
    rank, alpha = (Counter(map(of, places)).most_common(1)[0][0] for of in (_rank, _alpha))
    return {
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": {place.module: place.rank for place in places if place.rank != rank},
        "alpha_pattern": {place.module: place.alpha for place in places if place.alpha != alpha},
        "target_modules": [place.module for place in places if place.parameter is None],
        "target_parameters": [f"{p.module}.{p.parameter}" for p in places if p.parameter is not None],
        "use_rslora": params["scaling"] == "rslora",
        "use_dora": params["use_dora"],
        "lora_bias": params["bias"],
    }


def _rank(place: _Place) -> int:
    return place.rank


def _alpha(place: _Place) -> float:
    return place.alpha


def _places(group: Mapping[str, Any], params: Mapping[str, Any], base: Base) -> Iterator[_Place]:
    params = {**params, **group["params"]}
    tensors = {name: tuple(shape) for name, shape in group["tensors"].items()}
    for site in unfold(group["at"]):
        module, parameter = base.placed(site)
        row = base.row(module)
        if params.get("parts") is not None:  # an export writes them over the whole width, with rows of zeros
            downs = [tensors[f"{part}_down"] for part in params["parts"]]
            rows = sum(tensors[f"{part}_up"][0] for part in params["parts"])
            down = (sum(shape[0] for shape in downs), downs[0][1])
            up = (row.out_features if row is not None and row.out_features is not None else rows, down[0])
        else:
            down, up = tensors["down"], tensors["up"]
            if "down_start" in tensors:  # the start is subtracted as a part of the same update
                down, up = (2 * down[0], *down[1:]), (up[0], 2 * up[1], *up[2:])
        rank = down[0] if len(down) < 3 or parameter is None else down[1]
        more = rank / params["rank"]
        alpha = params["alpha"] * (more if params["scaling"] == "standard" else sqrt(more))
        embedding = row is not None and row.kind == "embedding"
        names = ("lora_embedding_A", "lora_embedding_B") if embedding else ("lora_A.weight", "lora_B.weight")
        shapes: dict[str, tuple[int, ...]] = dict(zip(names, (down, up), strict=True))
        if "magnitude" in tensors:
            shapes["lora_magnitude_vector"] = tensors["magnitude"]
        if "bias" in tensors:
            shapes["lora_B.bias"] = tensors["bias"]
        yield _Place(module, shapes, rank, alpha, parameter)
