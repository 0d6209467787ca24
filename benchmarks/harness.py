"""Interleaved timing: ours, the peer and, where it says something, the bare backbone take turns, many times."""

from __future__ import annotations

import gc
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

_HERE = Path(__file__).parent


@dataclass(frozen=True)
class Row:
    """One line of the results."""

    what: str
    ours: str
    peer: str
    ratio: str
    """Median over pairs, with the quartiles."""
    target: str
    met: str
    """`yes`, `no`, or `-` where there is no target."""
    note: str = ""
    """What explains it; for a miss, the profile that does."""


@dataclass(frozen=True)
class Table:
    """A table of its own, such as one of the scaling study."""

    title: str
    head: tuple[str, ...]
    lines: tuple[tuple[str, ...], ...]
    note: str = ""


@dataclass(frozen=True)
class Series:
    """One curve of a plot: a quantity with its quartiles."""

    plot: str
    name: str
    x: tuple[float, ...]
    low: tuple[float, ...]
    middle: tuple[float, ...]
    high: tuple[float, ...]

    @classmethod
    def of(cls, plot: str, name: str, points: Mapping[float, list[float]], scale: float = 1.0) -> Series:
        """Make a curve of measurements by x."""
        found = [quartiles([scale * value for value in values]) for values in points.values()]
        low, middle, high = zip(*found, strict=True)
        return cls(plot, name, tuple(points), low, middle, high)


Item = Row | Table | Series


@dataclass
class Limits:
    """What bounds a trial; a full run has no bounds."""

    pairs: int | None = None
    loaded: int | None = None
    """Of deltas: a PEFT model with 100 adapters takes a minute to make."""

    def counts(self, *counts: int) -> tuple[int, ...]:
        """Return the counts of deltas that may be loaded."""
        return tuple(count for count in counts if self.loaded is None or count <= self.loaded)


LIMITS = Limits()


def interleave(
    contestants: Mapping[str, Callable[..., Any]],
    pairs: int = 20,
    warm_up: int = 3,
    before: Mapping[str, Callable[[], Any]] | None = None,
) -> dict[str, list[float]]:
    """Time each contestant `pairs` times, in turn, after a warm-up; seconds.

    What `before` has for a contestant is called each time first, untimed, and its result is handed over.
    """
    if LIMITS.pairs is not None:
        pairs, warm_up = min(pairs, LIMITS.pairs), 1
    before = before or {}
    times: dict[str, list[float]] = {name: [] for name in contestants}
    gc.collect()
    gc.disable()
    try:
        for turn in range(pairs + warm_up):
            for name, run in contestants.items():
                given = [before[name]()] if name in before else []
                start = time.perf_counter()
                run(*given)
                elapsed = time.perf_counter() - start
                if turn >= warm_up:
                    times[name].append(elapsed)
    finally:
        gc.enable()
    return times


def many(run: Callable[[], Any], times: int) -> Callable[[], None]:
    """Repeat something too short to be timed alone."""

    def repeated() -> None:
        for _ in range(times):
            run()

    return repeated


def quartiles(values: list[float]) -> tuple[float, float, float]:
    """Return the lower quartile, the median and the upper quartile."""
    low, _, high = statistics.quantiles(values, n=4)
    return low, statistics.median(values), high


def ratio(numerator: list[float], denominator: list[float], scale: float = 1.0) -> tuple[float, str]:
    """Return the median ratio pair by pair, and its text with the quartiles."""
    low, median, high = quartiles([scale * a / b for a, b in zip(numerator, denominator, strict=True)])
    return median, f"{number(median)} ({number(low)}–{number(high)})"


def excess(ours: list[float], peer: list[float], bare: list[float]) -> tuple[float, float, float, str]:
    """Return (ours over bare, peer over bare, our excess as a part of the peer's, its text), medians pair by pair."""
    first = statistics.median(a / c for a, c in zip(ours, bare, strict=True))
    second = statistics.median(b / c for b, c in zip(peer, bare, strict=True))
    part = (first - 1) / (second - 1)
    return first, second, part, f"{number(part)} of the peer's excess"


def seconds(values: list[float], scale: float = 1.0) -> str:
    """Write a median time in a readable unit."""
    median = statistics.median(values) * scale
    for unit, size in (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6)):
        if median >= size:
            return f"{median / size:.3g} {unit}"
    return f"{median / 1e-9:.3g} ns"


def number(value: float) -> str:
    """Write a number to three digits, thousands separated."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def verdict(met: bool) -> str:
    """Write whether a target is met."""
    return "yes" if met else "no"


def machine() -> dict[str, str]:
    """Return what this ran on, and how many processes wanted to run beside it (the load average of the last minute)."""
    packages = {name: version(name) for name in ("torch", "transformers", "peft")}
    model = platform.processor() or platform.machine()
    if os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            model = next((line.split(":")[1].strip() for line in file if line.startswith("model name")), model)
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=_HERE, capture_output=True, text=True)
    return {
        "deltaspec": commit.stdout.strip() or "without its repository",
        "processor": f"{model}, {os.cpu_count()} cores",
        "threads": str(torch.get_num_threads()),
        "load before": f"{os.getloadavg()[0]:.1f}",
        "python": platform.python_version(),
        **packages,
    }
