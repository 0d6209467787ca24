"""Modes in which steps of autograd in Python stand aside."""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd import forward_ad

_is_transformed = torch._C._are_functorch_transforms_active
_top_hooks = torch._C._autograd._top_saved_tensors_default_hooks  # noqa: SLF001  # which hooks are on, no public name says


def is_rewritten() -> bool:
    """Return whether others rewrite or differentiate what runs: compilers, torch.func, forward-mode differentiation."""
    return torch.compiler.is_compiling() or _is_transformed() or forward_ad._current_level >= 0  # noqa: SLF001


def is_checkpointed() -> bool:
    """Return whether checkpointing lets go of what is kept here, or makes it again.

    It has to find the same tensors in the same order when the forward runs again, in which hooks may be gone.
    """
    hooks: Any = _top_hooks(True)
    return hooks is not None and getattr(hooks[1], "__module__", None) == "torch.utils.checkpoint"
