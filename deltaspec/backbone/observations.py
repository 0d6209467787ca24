"""What forwards of a model showed of its modules, observed when it is first asked for."""

from __future__ import annotations

from typing import Any

from torch import nn

from deltaspec.backbone.observe import observe
from deltaspec.backbone.recorder import Observation
from deltaspec.backbone.table import Row
from deltaspec.backbone.writes import is_published


class Observations:
    """Lets one forward of a model show what its modules do. It runs when it is first needed.

    Where no inputs are given, it is not needed for the linear and norm layers that have a role in an architecture of
    transformers: the test suite observes each of those architectures.
    """

    def __init__(self, model: nn.Module, example_inputs: Any = None) -> None:
        self._model, self._inputs = model, example_inputs
        self._vouched = example_inputs is None and _is_vouched_for(model)
        self._seen: dict[str, Observation] | None = None
        self.failure: str | None = None
        """Reason why a needed forward could not run; static knowledge about torch's own modules is there even so."""

    def of(self, row: Row) -> Observation | None:
        """Return what is known of a module; None where the forward could not run."""
        if self._vouched and row.roles and row.kind in ("linear", "conv1d", "norm"):
            return Observation(True)
        return self._run().get(row.fqn)

    def seen(self, row: Row) -> Observation | None:
        """Return what a forward showed of a module; None where it could not run."""
        found = self._run().get(row.fqn)
        return None if self.failure is not None else found

    def unused(self, *, run: bool = True) -> frozenset[str]:
        """Return the FQNs of the modules that take no part in what the model gives, so far as a forward showed it.

        `run=False` asks for no forward that was not run yet.
        """
        seen = self._run() if run else self._seen or {}
        if self.failure is not None:
            return frozenset()
        return frozenset(n for n, o in seen.items() if o.fate == "idle" or not (o.called or o.host is not None))

    def _run(self) -> dict[str, Observation]:
        if self._seen is None:
            self._seen, self.failure = observe(self._model, self._inputs)
        return self._seen


def _is_vouched_for(model: nn.Module) -> bool:
    """Return whether a model is one of transformers', and what holds others in it runs theirs or torch's."""
    known = type(model).__module__.startswith("transformers.models.")
    return known and all(is_published(module) for module in model.modules() if module._modules)
