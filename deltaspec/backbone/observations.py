"""What forwards of a model showed of its modules, observed when it is first asked for."""

from __future__ import annotations

from functools import cache
from typing import Any

from torch import nn

from deltaspec.backbone.forwards import foreign_forward
from deltaspec.backbone.observe import Observation, observe
from deltaspec.backbone.table import Row


class Observations:
    """Lets one forward of a model show what its modules do. It runs when it is first needed.

    Where no inputs are given, it is not needed for the linear and norm layers that have a role in an architecture of
    transformers: the test suite observes each of those architectures.
    """

    def __init__(self, model: nn.Module, example_inputs: Any = None) -> None:
        self._model, self._inputs = model, example_inputs
        self._vouched = example_inputs is None and _is_published(model)
        self._seen: dict[str, Observation] | None = None
        self.failure: str | None = None
        """Reason why a needed forward could not run; static knowledge about torch's own modules is there even so."""

    def of(self, row: Row) -> Observation | None:
        """Return what is known of a module; None where the forward could not run."""
        if self._vouched and row.roles and row.kind in ("linear", "conv1d", "norm"):
            return Observation(True)
        if self._seen is None:
            self._seen, self.failure = observe(self._model, self._inputs)
        return self._seen.get(row.fqn)


def _is_published(model: nn.Module) -> bool:
    """Return whether a model is one of transformers', with no forward in it that came from elsewhere."""
    return type(model).__module__.startswith("transformers.models.") and all(map(_is_as_published, model.modules()))


def _is_as_published(module: nn.Module) -> bool:
    """Return whether a module that holds others runs the forward that transformers, or torch, wrote for it."""
    if not module._modules:
        return True
    if foreign_forward(module) is not None:
        return False
    kind: Any = type(module)
    return all(home.startswith(("transformers.", "torch.nn.")) for home in _homes(kind))


@cache
def _homes(kind: Any) -> tuple[str, str]:
    """Return the Python modules of a class and of its forward, which may have been put there."""
    return kind.__module__, str(getattr(kind.forward, "__module__", ""))
