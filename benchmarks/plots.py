"""Plots of the curves in `results.json`, as SVG, in colours that colour-blind eyes tell apart."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, NullLocator

# Okabe and Ito's palette.
_STYLES: dict[str, dict[str, Any]] = {
    "deltaspec": {"color": "#0072B2", "marker": "o", "linewidth": 2.2},
    "deltaspec, merged": {"color": "#56B4E9", "marker": "D", "linewidth": 1.2},
    "PEFT": {"color": "#D55E00", "marker": "s", "linewidth": 1.8},
    "PEFT, set_adapter": {"color": "#D55E00", "marker": "s", "linewidth": 1.8},
    "PEFT, hot-swap": {"color": "#CC79A7", "marker": "^", "linewidth": 1.8},
    "PEFT, merged": {"color": "#E69F00", "marker": "v", "linewidth": 1.2},
}
_GREY = "#555555"
_LINE = 12.0
"""Between two lines of text, in points."""


@dataclass(frozen=True)
class Plot:
    """What a plot says around its curves."""

    title: str
    x: str
    y: str
    log_y: bool = False
    level: tuple[float, str] | None = None
    """A horizontal line, and what it is."""


PLOTS = {
    "switching": Plot(
        "Switching the active delta (12 × 256 GPT-2, LoRA on 48 sites)",
        "deltas loaded (with one: off and on)",
        "time of one switch",
        log_y=True,
    ),
    "mixing": Plot(
        "A batch of 8 rows under different deltas (12 × 256 GPT-2, 8 × 16 tokens)",
        "deltas loaded; the rows are under 8 of them, or under all of fewer",
        "time, over one delta for all rows",
        level=(1.05, "target, 1.05"),
    ),
    "tokens": Plot(
        "Forward with LoRA on 56 linears (8 × 512 Llama, one row)",
        "tokens",
        "time, over the bare backbone",
        level=(1.0, "bare backbone"),
    ),
}


def draw(data: Mapping[str, Any], folder: Path) -> None:
    """Draw each plot of which there are curves."""
    folder.mkdir(parents=True, exist_ok=True)
    curves = [curve for group in data["groups"].values() for curve in group["series"]]
    for name, plot in PLOTS.items():
        if found := [curve for curve in curves if curve["plot"] == name]:
            _draw(plot, found, folder / f"{name}.svg")


def _draw(plot: Plot, curves: list[Mapping[str, Any]], path: Path) -> None:
    settings = {"svg.hashsalt": path.stem, "font.size": 10, "axes.spines.top": False, "axes.spines.right": False}
    with plt.rc_context(settings):
        figure, axes = plt.subplots(figsize=(8, 4.4), layout="constrained")
        axes.set_xscale("log")
        if plot.log_y:
            axes.set_yscale("log")
        for curve in curves:
            style = _STYLES[curve["name"]]
            axes.plot(curve["x"], curve["middle"], markersize=5, **style)
            axes.fill_between(curve["x"], curve["low"], curve["high"], color=style["color"], alpha=0.18, linewidth=0)
        ticks = sorted({x for curve in curves for x in curve["x"]})
        axes.set_xticks(ticks, [f"{x:,.0f}" for x in ticks])
        axes.xaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_formatter(FuncFormatter(_time if plot.log_y else lambda y, _: f"{y:.2f} ×"))
        if plot.level is not None:
            axes.axhline(plot.level[0], color=_GREY, linewidth=1, linestyle=(0, (4, 3)), zorder=0)
        axes.grid(axis="y", color="#dddddd", linewidth=0.6)
        axes.set_axisbelow(True)
        axes.set_title(plot.title, loc="left", fontweight="bold", fontsize=11)
        axes.set_xlabel(plot.x)
        axes.set_ylabel(f"{plot.y} (median, quartiles)")
        _label(axes, plot, curves)
        # The date would make another file of the same curves.
        figure.savefig(path, metadata={"Date": None}, facecolor="white")
        plt.close(figure)


def _label(axes: Axes, plot: Plot, curves: list[Mapping[str, Any]]) -> None:
    """Write each name beside the end of its curve, moved apart where they would overlap."""
    farthest = max(c["x"][-1] for c in curves)
    labels = []
    for curve in curves:
        x, y, name, color = curve["x"][-1], curve["middle"][-1], curve["name"], _STYLES[curve["name"]]["color"]
        if x == farthest:
            labels.append((y, name, color))
        else:
            axes.annotate(
                name, (x, y), xytext=(8, 0), textcoords="offset points", va="center", color=color, fontsize=9,
                fontweight="bold",
            )  # fmt: skip
    if plot.level is not None:
        labels.append((*plot.level, _GREY))
    labels.sort()
    axes.figure.canvas.draw()  # the layout decides where the data are
    ends = [axes.transData.transform((1.0, y))[1] * 72 / axes.figure.dpi for y, _, _ in labels]
    for (y, text, color), end, place in zip(labels, ends, apart(ends, _LINE), strict=True):
        axes.annotate(
            text, (1, y), xycoords=("axes fraction", "data"), xytext=(6, place - end), textcoords="offset points",
            va="center", color=color, fontsize=9, annotation_clip=False,
            fontweight="normal" if color == _GREY else "bold",
        )  # fmt: skip


def apart(places: list[float], least: float) -> list[float]:
    """Move ascending places apart, each as little as its neighbours allow."""
    groups: list[list[float]] = []
    for place in places:
        groups.append([place])
        while (
            len(groups) > 1
            and _middle(groups[-1]) - _middle(groups[-2]) < least * (len(groups[-1]) + len(groups[-2])) / 2
        ):
            last = groups.pop()
            groups[-1] += last
    return [_middle(group) + least * (i - (len(group) - 1) / 2) for group in groups for i in range(len(group))]


def _middle(group: list[float]) -> float:
    return sum(group) / len(group)


def _time(value: float, _: int) -> str:
    for unit, size in (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6)):
        if value >= size * 0.999:
            return f"{value / size:.3g} {unit}"
    return f"{value / 1e-9:.3g} ns"
