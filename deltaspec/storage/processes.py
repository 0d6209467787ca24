"""Several processes that hold parts of the same tensors: one of them writes, and all learn what came of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TypeVar

import torch.distributed as dist

_Piece = TypeVar("_Piece")


def in_first_process(write: Callable[[Iterator[_Piece]], None], pieces: Iterator[_Piece]) -> None:
    """Write pieces, whose values all processes bring together, in the first one; the others wait.

    What it raises is raised in all of them. Where it fails half-way, it still takes part in what is left, or the others
    would wait for ever.
    """
    outcome: list[Exception | None] = [None]
    if dist.get_rank() == 0:
        try:
            write(pieces)
        except Exception as error:
            outcome[0] = error
    for _ in pieces:
        pass
    dist.broadcast_object_list(outcome, src=0)
    if outcome[0] is not None:
        raise outcome[0]
