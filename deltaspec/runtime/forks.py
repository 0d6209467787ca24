"""Forks: the child has only the thread that forked, and what other threads held or were in the midst of stays so.

The locks of all views are taken before a fork and released after it, in both processes: so nobody is in the midst of a
switch. A view that another thread had locked for too long, or whose rows it ran, refuses to go on in the child.
"""

from __future__ import annotations

import os
import threading
import weakref
from time import monotonic
from typing import Any, Protocol

MOST_SECONDS = 5.0
"""A fork waits so long for all locks together."""


class Guarded(Protocol):
    """What a lock guards."""

    lock: Any

    def after_fork(self, *, torn: bool) -> None:
        """Go on in the child. `torn`: some other thread of the parent kept a lock, and is not there any more."""


class ForkLock:
    """A lock for what the whole process does one at a time, and no fork may be in the midst of."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        guard(self, 0)

    def after_fork(self, *, torn: bool) -> None:
        """Go on in the child: views refuse by themselves where they must."""


_guarded: tuple[weakref.WeakSet[Guarded], ...] = (weakref.WeakSet(), weakref.WeakSet(), weakref.WeakSet())
_mine = threading.local()
"""What the thread that forks has taken."""


def guard(what: Guarded, order: int) -> None:
    """Let forks wait for the lock of this for as long as it lives.

    `order` is that in which a thread takes several: those of the process (0), then views (1), then what they share (2).
    """
    _guarded[order].add(what)


def _before() -> None:
    end = monotonic() + MOST_SECONDS
    guarded = [one for several in _guarded for one in list(several)]
    _mine.taken = [(one, one.lock.acquire(timeout=max(0.0, end - monotonic()))) for one in guarded]


def _in_parent() -> None:
    for one, held in _mine.__dict__.pop("taken", ()):
        if held:
            one.lock.release()


def _in_child() -> None:
    taken = _mine.__dict__.pop("taken", ())
    for one, held in taken:
        if held:
            one.lock.release()
        else:
            one.lock = threading.RLock()
    torn = not all(held for _, held in taken)
    for one, _ in taken:
        one.after_fork(torn=torn)


if hasattr(os, "register_at_fork"):  # which Windows has not, nor forks
    os.register_at_fork(before=_before, after_in_parent=_in_parent, after_in_child=_in_child)
