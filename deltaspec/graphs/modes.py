"""Modes in which steps of autograd in Python stand aside."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

PLAIN = (Tensor, nn.Parameter)
"""Types of tensors that have no rules of their own, as subclasses do."""
_is_transformed = torch._C._are_functorch_transforms_active
_is_traced = torch._C._is_tracing  # noqa: SLF001  # torch.jit.is_tracing, typed
_top_hooks = torch._C._autograd._top_saved_tensors_default_hooks  # noqa: SLF001  # which hooks are on, no public name says


def is_rewritten() -> bool:
    """Return whether others rewrite or differentiate what runs: compilers, traces, torch.func, forward-mode AD.

    To be asked before the size of a tensor is: compilers take that for a condition on their inputs.
    """
    if torch.compiler.is_compiling() or _is_traced():
        return True
    return _is_transformed() or forward_ad._current_level >= 0  # noqa: SLF001


def is_watched() -> bool:
    """Return whether a mode sees every operator. Some keep what operators give, and it may not be written into."""
    return is_in_torch_dispatch_mode()


def unseen() -> Any:
    """Return a context in which no hooks of others see what autograd keeps."""
    return nullcontext() if _top_hooks(True) is None else saved_tensors_hooks(_as_it_is, _as_it_is)


def _as_it_is(tensor: Tensor) -> Tensor:
    return tensor


def is_checkpointed() -> bool:
    """Return whether checkpointing lets go of what is kept here, or makes it again.

    It has to find the same tensors in the same order when the forward runs again, in which hooks may be gone.
    """
    hooks: Any = _top_hooks(True)
    return hooks is not None and getattr(hooks[1], "__module__", None) == "torch.utils.checkpoint"
