"""Steps that have to be done, whatever interrupts them."""

from __future__ import annotations

from collections.abc import Callable


def surely(step: Callable[[], None]) -> None:
    """Run a step that may be begun again, to its end, even where Ctrl-C comes in its midst."""
    try:
        step()
    except KeyboardInterrupt:
        step()
        raise
