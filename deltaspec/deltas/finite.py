"""Tensors that hold NaN or infinite values, which are neither saved nor merged."""

from __future__ import annotations

import torch
from torch import Tensor

from deltaspec.diagnostics.findings import Diagnostic


def is_finite(value: Tensor) -> bool:
    """Return whether no value is NaN or infinite."""
    if not value.is_floating_point() or not value.numel():
        return True
    if value.element_size() == 1:
        value = value.float()  # no minimum is computed of float8
    low, high = value.aminmax()  # NaN comes through, and one pass is enough
    return bool(torch.isfinite(low)) and bool(torch.isfinite(high))


def not_finite(delta: str, key: str, file: str = "<model>") -> Diagnostic:
    """Return the finding about a tensor that is not finite, in the model or in a file."""
    code, hint = "DS520" if file == "<model>" else "DS527", "the training diverged: go back to an earlier state"
    return Diagnostic(code, f"{delta}: tensor {key} has NaN or infinite values", file=file, suggestion=hint)
