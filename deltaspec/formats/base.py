"""The base model that foreign adapters are read for: its modules, its weights, and plans on it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from deltaspec.backbone.observations import Observations
from deltaspec.backbone.table import ModuleTable, Row
from deltaspec.backbone.tabulate import tabulate
from deltaspec.formats.layout import Headers
from deltaspec.language.load import load
from deltaspec.planning.plan import Plan
from deltaspec.planning.resolve import resolve


class Base:
    """A model without deltas, looked at once for all adapters that are read for it."""

    def __init__(self, model: nn.Module, example_inputs: Any = None) -> None:
        self.model = model
        self.observations = Observations(model, example_inputs)
        self._plans: dict[str, Plan] = {}
        self.selectors: dict[Any, Any] = {}
        """Selectors by the places that they were made for: adapters of one base mostly have the same ones."""
        self.headers: Headers = {}
        """Headers of files that hold the same tensors, but for their values."""

        self.recipes: dict[Any, Any] = {}
        """How adapters were read, by all of them but their values: see `formats/alike.py`."""

    @cached_property
    def table(self) -> ModuleTable:
        """All of its modules."""
        return tabulate(self.model)

    @cached_property
    def rows(self) -> dict[str, Row]:
        """Rows by FQN, other names of the same module included."""
        named = {alias: row for row in self.table.rows for alias in row.aliases}
        return named | {row.fqn: row for row in self.table.rows}

    @property
    def config(self) -> Any:
        """Configuration of a transformers model; None where it has none."""
        return getattr(self.model, "config", None)

    @cached_property
    def is_meta(self) -> bool:
        """Whether its weights have no values."""
        return any(parameter.is_meta for parameter in self.model.parameters())

    def tensor(self, fqn: str) -> Tensor:
        """Return a parameter or buffer. Raises KeyError."""
        owner, _, name = fqn.rpartition(".")
        module = self.model.get_submodule(owner)
        found: Tensor | None = module._parameters.get(name)
        found = module._buffers[name] if found is None else found
        assert found is not None
        return found.detach()

    def plan(self, document: Mapping[str, Any]) -> Plan:
        """Plan a spec's data on the model. Raises DeltaSpecError with all findings."""
        identity = json.dumps(document, sort_keys=True)
        found = self._plans.get(identity)
        if found is None:
            with torch.inference_mode(False):
                found = resolve((load(document),), self.table, self.observations)
            self._plans[identity] = found
        return found
