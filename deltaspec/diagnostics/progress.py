"""Progress of long work, for whoever watches a terminal; nothing is written anywhere else."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from typing import TypeVar

_Item = TypeVar("_Item")
MANY = 50
"""Pieces of work from which on there is something to watch."""


def tracked(items: Iterable[_Item], what: str, total: int) -> Iterator[_Item]:
    """Yield the items; where they are many and standard error is a terminal, show there how far they are."""
    if total < MANY or not sys.stderr.isatty():
        yield from items
        return
    from rich.console import Console  # which takes time to load, and is seldom needed
    from rich.progress import track

    yield from track(items, what, total=total, console=Console(stderr=True), transient=True)
