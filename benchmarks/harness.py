"""Interleaved timing: ours, the peer and, where it says something, the bare backbone take turns, many times."""

from __future__ import annotations

import gc
import os
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.metadata import version
from typing import Any

import torch


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


def interleave(contestants: dict[str, Callable[[], Any]], pairs: int = 20, warm_up: int = 3) -> dict[str, list[float]]:
    """Time each contestant `pairs` times, in turn, after a warm-up; seconds."""
    times: dict[str, list[float]] = {name: [] for name in contestants}
    gc.collect()
    gc.disable()
    try:
        for turn in range(pairs + warm_up):
            for name, run in contestants.items():
                start = time.perf_counter()
                run()
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
    """Give the lower quartile, the median and the upper quartile."""
    low, _, high = statistics.quantiles(values, n=4)
    return low, statistics.median(values), high


def ratio(numerator: list[float], denominator: list[float], scale: float = 1.0) -> tuple[float, str]:
    """Give the median ratio pair by pair, and its text with the quartiles."""
    low, median, high = quartiles([scale * a / b for a, b in zip(numerator, denominator, strict=True)])
    return median, f"{number(median)} ({number(low)}–{number(high)})"


def excess(ours: list[float], peer: list[float], bare: list[float]) -> tuple[float, float, float, str]:
    """Give (ours over bare, peer over bare, our excess as a part of the peer's, its text), medians pair by pair."""
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


def machine() -> dict[str, str]:
    """Say what this ran on."""
    packages = {name: version(name) for name in ("torch", "transformers", "peft")}
    model = platform.processor() or platform.machine()
    if os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            model = next((line.split(":")[1].strip() for line in file if line.startswith("model name")), model)
    return {
        "processor": model,
        "threads": str(torch.get_num_threads()),
        "python": platform.python_version(),
        **packages,
    }


def table(rows: list[Row]) -> str:
    """Write the rows as a Markdown table."""
    head = "| what | deltaspec | PEFT | ratio: median (quartiles) | target | met |\n|---|---|---|---|---|---|\n"
    lines = [f"| {r.what} | {r.ours} | {r.peer} | {r.ratio} | {r.target} | {r.met} |" for r in rows]
    notes = [f"- **{r.what}**: {r.note}" for r in rows if r.note]
    return head + "\n".join(lines) + "\n" + ("\n" + "\n".join(notes) + "\n" if notes else "")


def as_data(rows: list[Row]) -> list[dict[str, str]]:
    """Give the rows as JSON data."""
    return [asdict(row) for row in rows]
