"""The estimate: what a step of training takes, in parts, with what came up where."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from deltaspec.costs.costs import Costs, KeptAt
from deltaspec.costs.text import as_data, as_markdown, as_text


class Estimate(Costs):
    """What one step of training takes, to be printed, compared and written down: see `Costs`."""

    def to_dict(self) -> dict[str, Any]:
        """Return the estimate as JSON data."""
        return as_data(self)

    def markdown(self) -> str:
        """Write the estimate for a comment in a pull request."""
        return as_markdown(self)

    def __str__(self) -> str:
        return as_text(self)


def places_of(kept: Mapping[str, int], most: int = 5) -> tuple[KeptAt, ...]:
    """Put modules together that differ by the numbers of their layers, and return those that keep most."""
    found: dict[str, list[int]] = {}
    for name, count in kept.items():
        folded = ".".join("*" if part.isdigit() else part for part in name.split("."))
        found.setdefault(folded or "(the model itself)", []).append(count)
    places = (KeptAt(name, len(counts), sum(counts)) for name, counts in found.items())
    return tuple(sorted((place for place in places if place.bytes), key=lambda place: -place.bytes))[:most]


def ways_out(estimate: Estimate) -> Sequence[str]:
    """Return what lowers the largest part."""
    given, parts = estimate.conditions, estimate.parts
    largest = max(parts, key=lambda name: parts[name] or 0)
    if largest == "backbone":
        half = [] if given.dtype in ("bfloat16", "float16") or given.base else ["dtype: bfloat16"]
        return [*half, *([] if given.base == "4bit" else ["base: 4bit"])] or ["take a smaller backbone"]
    if largest in ("deltas", "gradients", "optimizer state"):
        packed = [] if given.optimizer.endswith("8bit") else ["optimizer: adamw_8bit"]
        return ["a lower rank, or fewer sites", *packed]
    checkpointing = [] if given.checkpointing else ["checkpointing: true"]
    length = [] if given.length is None else [f"a length below {given.length:,}"]
    return [f"a batch below {given.batch:,}", *length, *checkpointing]
