"""Derived deltas: built from other deltas of their spec, without training.

Whatever it is made of, a derived delta is a low-rank update of scale 1: it has lora's tensors, as buffers, and works,
merges and is saved as lora. How its tensors are computed, and when, is in `deltas/combine.py`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from graphlib import CycleError, TopologicalSorter
from typing import Annotated, Any, Literal

from pydantic import Field

from deltaspec.diagnostics.findings import Diagnostic, Path
from deltaspec.diagnostics.wording import closest_delta, show_value
from deltaspec.documents.document import Document
from deltaspec.methods.base import Method
from deltaspec.methods.declarations import MethodParams
from deltaspec.methods.shared.rank import MAX_RANK

Weight = Annotated[float, Field(ge=-1e6, le=1e6)]
METHOD = "lora"
"""The method that a derived delta has."""
Combine = Literal["linear", "cat", "svd", "ties", "dare_linear", "dare_ties"]
OTHERS = ("method", "target", "overrides", "train")
"""Keys that only deltas have which are not derived."""
_USED: Mapping[str, tuple[str, ...]] = {
    "linear": (),
    "cat": (),
    "svd": ("rank",),
    "ties": ("density", "majority_sign"),
    "dare_linear": ("density", "seed"),
    "dare_ties": ("density", "majority_sign", "seed"),
}
"""The parameters of each way to combine."""


class DerivedParams(MethodParams):
    """Parameters of a derived delta."""

    density: Annotated[float, Field(gt=0, le=1)] | None = None
    """For `ties` and `dare_*`: the part of each source's values that is kept."""
    majority_sign: Literal["total", "frequency"] = "total"
    """For `ties` and `dare_ties`: whether a sign is elected by the sum of the values, or by their number."""
    rank: Annotated[int, Field(ge=1, le=MAX_RANK)] | None = None
    """For `svd`: rank of the result; left out, the largest of the sources'."""
    seed: Annotated[int, Field(ge=0, lt=1 << 63)] = 0
    """For `dare_*`: seed of the choice of values that are kept."""


@dataclass(frozen=True, slots=True)
class Derivation:
    """The sources of a derived delta, and how it is built from them."""

    combine: str
    sources: tuple[tuple[str, float], ...]
    """Name and weight of each source."""
    params: DerivedParams

    def to_data(self) -> dict[str, Any]:
        """Return what a document writes for it, every parameter that counts written out."""
        return {"from": dict(self.sources), "combine": self.combine, "params": written(self.combine, self.params)}

    def __str__(self) -> str:
        sources = ", ".join(f"{name} × {weight:g}" for name, weight in self.sources)
        params = "".join(f" {key}={value}" for key, value in written(self.combine, self.params).items())
        return f"derived from {sources}; combine={self.combine}{params}"


def written(combine: str | None, params: MethodParams) -> dict[str, Any]:
    """Return parameters as a document writes them, all of them, or those that a way to combine uses."""
    fields, values = type(params).model_fields, params.model_dump(mode="json")
    keys = values if combine is None else _USED[combine]
    return {key: values[key] for key in keys if values[key] is not None or fields[key].default is not None}


def check(document: Document, methods: Mapping[str, Method]) -> Iterator[Diagnostic]:
    """Return the findings about the derived deltas of a document, beside those of the schema."""
    listed = document.data.get("deltas")
    deltas = [d if isinstance(d, dict) else {} for d in listed] if isinstance(listed, list) else []
    by_name = {d["name"]: d for d in reversed(deltas) if isinstance(d.get("name"), str)}
    yield from _circle(document, by_name)
    for index, delta in enumerate(deltas):
        if "from" not in delta:
            continue
        path = ("deltas", index)
        sources = delta["from"] if isinstance(delta["from"], dict) else {}
        for name in sources:
            if name not in by_name:
                near = closest_delta(name, reversed(by_name))
                hint = f'did you mean "{near}"?' if near else "a source is another delta of this spec"
                message = f"no delta is named {show_value(name)}"
                yield document.diagnostic("DS223", message, (*path, "from", name), hint, key=True)
        if all(name in by_name for name in sources):
            yield from _check_methods(document, path, delta, [by_name[name] for name in sources], methods)
        weights = [weight for weight in sources.values() if isinstance(weight, int | float)]
        if weights and len(weights) == len(sources) and not any(weights):
            message, hint = "all weights are 0, so this delta would change nothing", "give a source a weight"
            yield document.diagnostic("DS204", message, (*path, "from"), hint)
        yield from _check_params(document, path, delta)


def _sources(delta: Mapping[str, Any]) -> list[str]:
    return [name for name in delta["from"] if isinstance(name, str)] if isinstance(delta.get("from"), dict) else []


def _circle(document: Document, by_name: Mapping[str, dict[str, Any]]) -> Iterator[Diagnostic]:
    """Report a delta that is derived from itself."""
    try:
        in_order({name: _sources(delta) for name, delta in by_name.items()})
    except CycleError as error:
        circle = list(reversed(error.args[1]))
        shown = circle if len(circle) <= 8 else [*circle[:4], "…", *circle[-3:]]
        index = next(i for i, delta in enumerate(document.data["deltas"]) if delta is by_name[circle[0]])
        message = f"circular derivation: {' → '.join(shown)}"
        yield document.diagnostic("DS224", message, ("deltas", index, "from"), "break the circle")


def in_order(sources: Mapping[str, Iterable[str]]) -> list[str]:
    """Sort names so that each comes after its sources. Raises CycleError."""
    return list(TopologicalSorter(sources).static_order())


def _check_methods(
    document: Document, path: Path, delta: dict[str, Any], sources: list[dict[str, Any]], methods: Mapping[str, Method]
) -> Iterator[Diagnostic]:
    """Return why the sources' methods cannot be combined."""
    place, combine = (*path, "from"), delta.get("combine")
    names = {s["name"]: METHOD if "from" in s else s.get("method") for s in sources}
    known = {name: methods[m] for name, m in names.items() if isinstance(m, str) and m in methods}
    if len(known) < len(names) or not known:
        return  # the schema says so
    if len({method.name for method in known.values()}) > 1:
        listed = ", ".join(f"{name} ({method.name})" for name, method in known.items())
        hint = "combine deltas of one method"
        yield document.diagnostic("DS225", f"the sources have different methods: {listed}", place, hint)
        return
    method = next(iter(known.values()))
    if method.promises.weight != "add":
        message = f"{method.name} does not add to a weight, so its deltas have no weighted sum"
        yield document.diagnostic("DS225", message, place, "combine deltas of a method such as lora")
    elif method.name != METHOD and combine in _USED and combine != "svd":
        message = f"combine: {combine} works on the factors of lora, and the sources are {method.name}"
        yield document.diagnostic("DS225", message, (*path, "combine"), "use combine: svd")
    elif combine == "svd" and "rank" not in method.Params.model_fields and not _params(delta).get("rank"):
        message = f"svd needs a rank here: {method.name} has none"
        yield document.diagnostic("DS210", message, path, "write params: {rank: 8}")


def _check_params(document: Document, path: Path, delta: dict[str, Any]) -> Iterator[Diagnostic]:
    combine, params = delta.get("combine"), _params(delta)
    if not isinstance(combine, str) or combine not in _USED:
        return  # the schema says so
    for key in params:
        if key in DerivedParams.model_fields and key not in _USED[combine]:
            takers = ", ".join(name for name, keys in _USED.items() if key in keys)
            message, hint = f"{key}: {combine} does not use it", f"delete it; it is for combine: {takers}"
            yield document.diagnostic("DS210", message, (*path, "params", key), hint, key=True)
    if "density" in _USED[combine] and "density" not in params:
        hint = "say which part of the values is kept, such as params: {density: 0.5}"
        yield document.diagnostic("DS210", f"{combine} needs a density", path, hint)


def _params(delta: dict[str, Any]) -> dict[str, Any]:
    return delta["params"] if isinstance(delta.get("params"), dict) else {}
