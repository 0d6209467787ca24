"""Ctrl-C while jobs are trained: the step at hand is finished first."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class Interrupts:
    """Whether Ctrl-C was pressed."""

    pressed = False


@contextmanager
def noticed() -> Iterator[Interrupts]:
    """Notice the first Ctrl-C inside, and let the second one through; only the main thread gets any."""
    found = Interrupts()
    before = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(before):
        yield found
        return

    def press(number: int, frame: FrameType | None) -> None:
        found.pressed = True
        signal.signal(signal.SIGINT, before)

    signal.signal(signal.SIGINT, press)
    try:
        yield found
    finally:
        signal.signal(signal.SIGINT, before)
