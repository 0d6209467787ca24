"""A model without weights, with the values of its tensors in a folder: what a record is made of, or compared with."""

from __future__ import annotations

from dataclasses import replace

from torch import nn

from deltaspec.backbone.observations import Observations
from deltaspec.backbone.record import Present
from deltaspec.backbone.values import Values
from deltaspec.folders.weights import Tensors


class PresentFolder(Present):
    """A backbone whose values lie elsewhere."""

    def __init__(self, model: nn.Module, tensors: Tensors) -> None:
        super().__init__(model, unused=Observations(model).unused)
        self._elsewhere = tensors

    def values(self, tensor: str) -> Values:
        """Return the values of one of its tensors, where they are."""
        found = super().values(tensor)
        return found if found.plain is not None else replace(found, plain=self._elsewhere.find(tensor))
