"""How much work a call does, counted rather than timed: the same on every machine and under every load."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import FrameType
from typing import Any, TypeVar

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

Result = TypeVar("Result")


def counting(work: Callable[[], Result]) -> tuple[Result, int]:
    """Return what a function returns, and how many calls, of Python or of C, it made."""
    calls = 0

    def count(frame: FrameType, event: str, argument: Any) -> None:
        nonlocal calls
        calls += event in ("call", "c_call")

    before = sys.getprofile()
    sys.setprofile(count)
    try:
        result = work()
    finally:
        sys.setprofile(before)
    return result, calls


def graphs_of(compiled: nn.Module, **options: Any) -> tuple[Any, list[Any]]:
    """Return a model under torch.compile, whole, and a list of the graphs made of it; they run as they are."""
    torch._dynamo.reset()
    graphs: list[Any] = []

    def count(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    return torch.compile(compiled, fullgraph=True, backend=count, **options), graphs


class _Operators(TorchDispatchMode):
    """Counts what is dispatched to tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return func(*args, **(kwargs or {}))


def operators(work: Callable[[], Any]) -> int:
    """Return how many operators of torch a function calls."""
    with _Operators() as seen:
        work()
    return seen.count
