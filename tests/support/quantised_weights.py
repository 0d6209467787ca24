"""Quantised weights, in the form that torchao gives them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class Int8Codes(Tensor):
    """Int8Codes of 8 bits with a scale, made as torchao makes its own."""

    codes: Tensor
    scale: float

    @staticmethod
    def __new__(cls, codes: Tensor, scale: float) -> Int8Codes:
        made: Any = torch.Tensor._make_wrapper_subclass(cls, codes.shape, dtype=torch.float32)
        made.codes, made.scale = codes, scale
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.ops.aten.detach.default, torch.ops.aten.alias.default):
            return cls(args[0].codes, args[0].scale)
        given = [a.dequantize() if isinstance(a, Int8Codes) else a for a in args]
        return func(*given, **(kwargs or {}))

    def dequantize(self) -> Tensor:
        return self.codes.float() * self.scale


def quantised(module: nn.Linear) -> None:
    weight = module.weight.detach()
    scale = float(weight.abs().max()) / 127
    module.weight = nn.Parameter(Int8Codes((weight / scale).round().to(torch.int8), scale), requires_grad=False)
