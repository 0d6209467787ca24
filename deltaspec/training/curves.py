"""Learning curves, drawn with matplotlib: losses, evaluations and learning rates of jobs over their steps."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from deltaspec.training.outcome import JobResult

_SMOOTH = 0.9


def draw(results: Sequence[JobResult], path: Path) -> None:
    """Draw the curves of jobs into a file. Raises ModuleNotFoundError, naming the extra, without matplotlib."""
    figure = _figure()
    measures = list(dict.fromkeys(name for result in results for e in result.evaluations for name in e.measures))
    titles = ["training loss (smoothed)", *(f"evaluation: {name}" for name in measures), "learning rate"]
    figure.set_size_inches(5.5 * len(titles), 4.2)
    for number, title in enumerate(titles):
        axes = figure.add_subplot(1, len(titles), number + 1, title=title, xlabel="step")
        for result in results:
            steps = list(range(1, result.step + 1))
            if number == 0:
                axes.plot(steps, _smoothed(result.losses), label=result.name)
            elif number == len(titles) - 1:
                axes.plot(steps, result.rates)
            else:
                points = [(e.step, e.measures[measures[number - 1]]) for e in result.evaluations]
                axes.plot([step for step, _ in points], [value for _, value in points], marker=".")
        axes.grid(alpha=0.3)
    figure.legend(loc="outside lower center", ncols=3, fontsize="small", frameon=False)
    figure.savefig(path)


def _figure() -> Any:
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        if error.name != "matplotlib":
            raise
        message = "learning curves need matplotlib: pip install 'deltaspec[train]'"
        raise ModuleNotFoundError(message, name="matplotlib") from None
    return Figure(layout="constrained")  # no pyplot: no display, and no state of the user's


def _smoothed(values: Sequence[float]) -> list[float]:
    """Return running means, the first values not weighted down."""
    mean, weight, found = 0.0, 0.0, []
    for value in values:
        mean, weight = _SMOOTH * mean + (1 - _SMOOTH) * value, _SMOOTH * weight + (1 - _SMOOTH)
        found.append(mean / weight)
    return found
