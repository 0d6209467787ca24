"""The first forward of deltas whose sites no example inputs could prove: it is watched, and refuses bypassed ones."""

from __future__ import annotations

import threading
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, Protocol

import torch

from deltaspec.backbone.observe import Recorder
from deltaspec.diagnostics.findings import DeltaSpecError, Diagnostic
from deltaspec.methods.registry import methods

if TYPE_CHECKING:
    from deltaspec.backbone.observe import Observation
    from deltaspec.runtime.program import Forward
    from deltaspec.runtime.program_builder import ProgramBuilder


class Watched(Protocol):
    """What is known of the deltas whose first forward is watched."""

    backbone: Any
    active: tuple[str, ...]
    unproven: set[str]

    def prove_reached(self, seen: Any, names: Iterable[str]) -> None:
        """Refuse those that a forward was seen to bypass."""

    def rebind(self) -> None:
        """Bind tensors anew."""


_ONE = threading.RLock()
"""Recording sets a state of the whole process (torch.compiler's stance)."""


def watched(attachments: Watched, forward: Forward, *args: Any, **kwargs: Any) -> tuple[Any, dict[str, Observation]]:
    """Run a forward of the model: (output, what was seen of each module)."""
    with _ONE:
        recorder = Recorder(attachments.backbone)
        with recorder.recording():
            output = forward(*args, **kwargs)
        return output, recorder.result()


class FirstForward:
    """Watches the first forward of a model whose sites no example inputs could prove, then takes itself out."""

    def __init__(self, attachments: Watched, base: Forward) -> None:
        self._attachments, self._base = attachments, base

    def run(self, *args: Any, **kwargs: Any) -> Any:
        """Run the model, once under observation."""
        attachments = self._attachments
        if torch.compiler.is_compiling():
            raise RuntimeError(
                "deltaspec DS440: pass example_inputs to deltaspec.compile, or call the model once first"
            )
        if attachments.unproven.isdisjoint(attachments.active):  # another thread or view was first
            return self._base(*args, **kwargs)
        output, seen = watched(attachments, self._base, *args, **kwargs)
        attachments.prove_reached(seen, attachments.active)
        attachments.rebind()
        return output


def refuse_bypassed(builder: ProgramBuilder, seen: dict[str, Observation], names: Iterable[str]) -> None:
    """Raise DeltaSpecError (DS437) for deltas whose modules' weights a forward was seen to read around them."""
    findings = []
    for name in names:
        for placement in builder.placements_of(name):
            fqn, found = placement.planned.site.row.fqn, seen[placement.planned.site.row.fqn]
            around = found.host is not None and (not found.called or methods()[placement.method].promises.weight)
            if around and placement.planned.site.host is None:
                how = "besides calling it" if found.called else "without calling it"
                message = f"delta {name!r} is bypassed: {found.host or 'the model'} reads the weights of {fqn} {how}"
                hint = "pass example_inputs to compile, so that the plan puts the delta on the weight or refuses it"
                findings.append(Diagnostic("DS437", message, suggestion=hint))
    if findings:
        raise DeltaSpecError(findings)
