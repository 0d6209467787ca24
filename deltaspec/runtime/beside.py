"""A module whose weight is kept as codes, under deltas that change its weight."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from deltaspec.backbone.stand_in import stand_in
from deltaspec.backbone.weight_forms import own_values
from deltaspec.methods.declarations import DeltaTensors
from deltaspec.runtime.lowering import Fold, fold_widely


class Beside:
    """Runs the module as it is, and adds what the change of its weight makes of the input.

    What a linear layer, an embedding or a convolution gives is linear in its weight and bias. So the codes stay as they
    are, and so does what their kernel makes of them: a delta that changes nothing adds zeros.
    """

    def __init__(self, module: nn.Module, folds: tuple[Fold, ...], own_forward: Any) -> None:
        self.module, self.folds, self.own_forward = module, folds, own_forward

    def __call__(self, tensors: tuple[Tensor, ...], *args: Any, **kwargs: Any) -> Any:
        """Run the module; `tensors` are those of all folds, in order."""
        leaving = self.own_forward(*args, **kwargs)
        before, after, start = own_values(self.module), dict[str, Tensor](), 0
        for fold in self.folds:
            own = DeltaTensors(fold.names, tensors[start:])
            start += len(fold.names)
            strength = tensors[start] if fold.scaled else None
            start += fold.scaled
            after |= fold_widely(self.module, fold, own, dict(after), strength)
        change: dict[str, Any] = {"weight": torch.zeros_like(before["weight"])}
        if "bias" in self.module._parameters:
            change["bias"] = None
        for name, value in after.items():
            change[name] = (value - before[name] if name in before else value).to(leaving.dtype)
        change["weight"] = change["weight"].to(leaving.dtype)
        return leaving + stand_in(self.module, change).forward(*args, **kwargs)
