"""The first forward of deltas whose sites no example inputs could prove: it is watched, and refuses bypassed ones."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from deltaspec.backbone.recorder import Observation, Recorder
from deltaspec.diagnostics.findings import DeltaSpecError, Diagnostic
from deltaspec.methods.registry import methods
from deltaspec.planning.streams import out_of_turn, way_out
from deltaspec.runtime.forks import ForkLock
from deltaspec.runtime.placements import Placements
from deltaspec.runtime.sockets import Forward

_ONE = ForkLock()
"""Recording sets a state of the whole process (torch.compiler's stance)."""


def watched(backbone: nn.Module, forward: Forward, *args: Any, **kwargs: Any) -> tuple[Any, dict[str, Observation]]:
    """Run a forward of a model: (output, what was seen of each module)."""
    with _ONE.lock:
        recorder = Recorder(backbone)
        with recorder.recording():
            output = forward(*args, **kwargs)
        return output, recorder.result()


class FirstForward:
    """Watches the first forward of a model whose sites no example inputs could prove, then takes itself out."""

    def __init__(
        self,
        backbone: nn.Module,
        base: Forward,
        is_proven: Callable[[], bool],
        prove: Callable[[dict[str, Observation]], None],
    ) -> None:
        self._backbone, self._base, self._is_proven, self._prove = backbone, base, is_proven, prove

    def run(self, *args: Any, **kwargs: Any) -> Any:
        """Run the model, once under observation."""
        if torch.compiler.is_compiling():
            hint = "pass example_inputs to deltaspec.compile, or call the model once first"
            raise RuntimeError(f"deltaspec DS440: {hint}")
        if self._is_proven():  # another thread or view was first
            return self._base(*args, **kwargs)
        output, seen = watched(self._backbone, self._base, *args, **kwargs)
        self._prove(seen)
        return output


def refuse_bypassed(placements: Placements, seen: dict[str, Observation], names: Iterable[str]) -> None:
    """Raise DeltaSpecError (DS437) for deltas whose modules' weights a forward was seen to read around them."""
    findings = []
    for name in names:
        for placement in placements.of(name):
            fqn, found = placement.planned.site.row.fqn, seen[placement.planned.site.row.fqn]
            around = found.host is not None and (not found.called or methods()[placement.method].promises.weight)
            if around and placement.planned.site.host is None:
                how = "besides calling it" if found.called else "without calling it"
                message = f"delta {name!r} is bypassed: {found.host or 'the model'} reads the weights of {fqn} {how}"
                hint = "pass example_inputs to compile, so that the plan puts the delta on the weight or refuses it; "
                hint += "where a forward was put on the model since (a trainer's fused head), leave that module out"
                findings.append(Diagnostic("DS437", message, suggestion=hint))
    if findings:
        raise DeltaSpecError(findings)


def refuse_unread(placements: Placements, seen: dict[str, Observation], names: Iterable[str]) -> None:
    """Raise DeltaSpecError (DS585) for deltas that read what enters other modules, where a forward gave them another
    tensor than they should have.
    """
    findings = []
    for name in names:
        for placement in placements.of(name):
            site = placement.planned.site
            if site.stream is None or not seen[site.row.fqn].called:
                continue
            if (reason := out_of_turn(site, site.stream, seen[site.stream], seen[site.row.fqn])) is not None:
                message = f"delta {name!r} cannot work at {site.fqn}: {reason}"
                findings.append(Diagnostic("DS585", message, suggestion=way_out(site)))
    if findings:
        raise DeltaSpecError(findings)
