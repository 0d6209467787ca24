"""The table of jobs while they are trained."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table


@contextmanager
def shown(draw: Callable[[], Table], progress: bool | Console) -> Iterator[None]:
    """Show a table anew four times a second, on standard error or a console; a file gets it once, at the end.

    `progress=False` shows nothing.
    """
    if progress is False:
        yield
        return
    from rich.console import Console
    from rich.live import Live

    console = Console(stderr=True) if progress is True else progress
    with Live(get_renderable=draw, console=console, refresh_per_second=4, redirect_stdout=False):
        yield
    if not console.is_terminal:
        console.line()
