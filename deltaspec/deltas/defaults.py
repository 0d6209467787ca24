"""torch's own defaults: float32 on the CPU, whatever the process has set."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

_FLOATING = frozenset({
    torch.empty, torch.zeros, torch.ones, torch.eye, torch.rand, torch.randn, torch.linspace, torch.logspace,
})  # fmt: skip
"""Functions that make tensors of the default dtype where they are told none."""


@contextmanager
def usual_defaults() -> Iterator[None]:
    """Make new tensors float32 and on the CPU inside this context, in this thread alone, unless they are told."""
    with torch.device("cpu"), _Single():
        yield


class _Single(TorchFunctionMode):
    """A default dtype of one thread; `torch.set_default_dtype` is one of the process."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        given = kwargs or {}
        if func in _FLOATING and given.get("dtype") is None:
            given = {**given, "dtype": torch.float32}
        return func(*args, **given)
