"""Where the time goes: what a row's note says of a miss."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch.profiler import ProfilerActivity, profile

from benchmarks.harness import LIMITS

_SMALL = 0.02
"""Of the whole: what is less is not named."""


def operators(run: Callable[[], Any], times: int = 5) -> tuple[float, dict[str, float]]:
    """Profile some calls; give the seconds of one, and those in torch's operators themselves, by name.

    What is left is Python, and starting operators. Profiling itself costs some of it.
    """
    times = times if LIMITS.pairs is None else LIMITS.pairs
    run()
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        for _ in range(times):
            run()
    averages = profiled.key_averages()
    own = {e.key.removeprefix("aten::"): e.self_cpu_time_total / 1e6 / times for e in averages}
    spans = profiled.profiler.kineto_results.events() if profiled.profiler else []
    begin, end = min(e.start_ns() for e in spans), max(e.end_ns() for e in spans)
    return (end - begin) / 1e9 / times, own


def difference(run: Callable[[], Any], beside: Callable[[], Any], what: str = "over the other") -> str:
    """Return which operators make up for what one call takes more than another, and how much is Python."""
    whole, own = operators(run)
    less, other = operators(beside)
    changes = {name: own.get(name, 0.0) - other.get(name, 0.0) for name in own.keys() | other.keys()}
    changes["Python and calls"] = (whole - sum(own.values())) - (less - sum(other.values()))
    largest = sorted(changes.items(), key=lambda item: -abs(item[1]))[:5]
    text = ", ".join(
        f"{name} {1e3 * value:+.2f} ms" for name, value in largest if abs(value) > _SMALL * abs(whole - less)
    )
    return f"profiled, {what} {1e3 * (whole - less):+.2f} ms: {text}"


def shares(run: Callable[[], Any]) -> str:
    """Return which operators take most of a call."""
    whole, own = operators(run)
    parts = {**own, "Python and calls": max(whole - sum(own.values()), 0.0)}
    largest = sorted(parts.items(), key=lambda item: -item[1])[:5]
    text = ", ".join(f"{name} {value / whole:.0%}" for name, value in largest if value > _SMALL * whole)
    return f"profiled, {1e3 * whole:.2f} ms: {text}"
