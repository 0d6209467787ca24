"""The time that the regular expressions of a spec may take on a model, all of them together."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from time import thread_time

from deltaspec.names.patterns import BacktrackingError

TOTAL_SECONDS = 5.0
"""Processor time of all regular expressions that are matched inside of one `timed`."""

_spent: ContextVar[list[float] | None] = ContextVar("spent", default=None)


class OverTimeError(BacktrackingError):
    """Regular expressions that take too long together."""


@contextmanager
def timed() -> Iterator[None]:
    """Count what regular expressions take inside, together; inside of another one, as a part of that."""
    if _spent.get() is not None:
        yield
        return
    token = _spent.set([0.0])
    try:
        yield
    finally:
        _spent.reset(token)


@contextmanager
def ticking() -> Iterator[None]:
    """Count the time inside as that of a regular expression. Raise OverTimeError where none is left."""
    spent = _spent.get()
    if spent is not None and spent[0] > TOTAL_SECONDS:
        message = f"the regular expressions up to this one take more than {TOTAL_SECONDS} s on the names of this model"
        raise OverTimeError(message, "use path:, type: or role: in the place of the slow ones")
    start = thread_time()
    try:
        yield
    finally:
        if spent is not None:
            spent[0] += thread_time() - start
