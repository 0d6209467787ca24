"""Estimates written out: as text, as Markdown for a pull request, as JSON data."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from deltaspec.costs.costs import Costs
from deltaspec.diagnostics.clean import clean
from deltaspec.diagnostics.wording import counted
from deltaspec.language.conditions import shown_amount

_UNKNOWN = "not known"


def as_data(estimate: Costs) -> dict[str, Any]:
    """Return an estimate as JSON data."""
    return {
        "for": estimate.conditions.model_dump(mode="json", exclude_none=True),
        "inputs": estimate.inputs,
        "trained": list(estimate.trained),
        "memory": {
            "parameters": estimate.parameters,
            "delta_parameters": estimate.delta_parameters,
            "gradients": estimate.gradients,
            "optimizer_state": estimate.optimizer_state,
            "activations": estimate.activations,
            "activations_without_passes": estimate.activations_without_passes,
            "working": estimate.working,
            "total": estimate.total,
            "complete": estimate.complete,
        },
        "flops": {"forward": estimate.forward_flops, "backward": estimate.backward_flops},
        "places": [{"at": p.name, "modules": p.modules, "bytes": p.bytes} for p in estimate.places],
        "notes": list(estimate.notes),
    }


def as_text(estimate: Costs) -> str:
    """Write an estimate as plain text."""
    lines = [clean(f"Estimate of a step: {_what(estimate)}")]
    rows = list(_rows(estimate))
    width, count = max(len(name) for name, _, _ in rows), max(len(size) for _, size, _ in rows)
    lines += [f"  {name:<{width}}  {size:>{count}}  {more}".rstrip() for name, size, more in rows]
    if estimate.places:
        lines.append("  Most is kept from:")
        size = max(len(shown_amount(place.bytes)) for place in estimate.places)
        for place in estimate.places:
            modules = counted(place.modules, "module")
            lines.append(clean(f"    {shown_amount(place.bytes):>{size}}  {place.name} ({modules})"))
    return "\n".join([*lines, *(clean(f"  ! {note}") for note in estimate.notes)])


def as_markdown(estimate: Costs) -> str:
    """Write an estimate for a comment in a pull request."""
    out = [f"#### Estimate of a step: {_what(estimate)}", "", "| part | size | |", "|---|---:|---|"]
    out += [f"| {name} | {size} | {_cell(more)} |" for name, size, more in _rows(estimate)]
    if estimate.places:
        kept = ", ".join(f"`{_cell(place.name)}` {shown_amount(place.bytes)}" for place in estimate.places)
        out += ["", f"Most is kept from {kept}."]
    return "\n".join(map(clean, [*out, *(f"- ⚠️ {note}" for note in estimate.notes)]))


def conditions_in_words(estimate: Costs) -> str:
    """Write what an estimate is for: `batch 8, length 512, adamw`."""
    given = estimate.conditions.model_dump(exclude_none=True, exclude={"deltas", "max"})
    optimizer, labels = given.pop("optimizer"), given.pop("labels")
    checkpointing = given.pop("checkpointing")
    words = [f"{key.replace('_', ' ')} {value}" for key, value in given.items()]
    words += [optimizer, *(["checkpointing"] if checkpointing else []), *([] if labels else ["without labels"])]
    return ", ".join(words)


def _what(estimate: Costs) -> str:
    inputs = f" ({estimate.inputs})" if estimate.inputs else ""
    return f"{conditions_in_words(estimate)}{inputs}"


def _rows(estimate: Costs) -> Iterator[tuple[str, str, str]]:
    """Yield name, size and remark of each line."""
    remarks = {"deltas": _deltas(estimate), "kept activations": _passes(estimate)}
    for name, size in estimate.parts.items():
        yield name, _UNKNOWN if size is None else shown_amount(size), remarks.get(name, "")
    least = "" if estimate.complete else "at least: of what is known"
    yield "total", shown_amount(estimate.total), least or "at the fullest moment of a step"
    if estimate.forward_flops is not None and estimate.backward_flops is not None:
        both = estimate.forward_flops + estimate.backward_flops
        yield "FLOPs", _flops(both), f"forward {_flops(estimate.forward_flops)}, backward the rest"


def _deltas(estimate: Costs) -> str:
    return f"trained: {', '.join(estimate.trained) or 'none'}"


def _passes(estimate: Costs) -> str:
    kept, without = estimate.activations, estimate.activations_without_passes
    if kept is None or without is None or kept == without:
        return ""
    return f"without passes {shown_amount(without)}"


def _flops(count: int) -> str:
    """Write a number of operations: `1.25 TFLOP`."""
    for unit, size in (("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6)):
        if count >= size:
            return f"{count / size:.3g} {unit}FLOP"
    return f"{count} FLOP"


def _cell(text: str) -> str:
    return text.replace("|", "\\|")
