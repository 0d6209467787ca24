"""Tasks of asyncio that share one view: one that switched it must not run under what another has attached since."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary

from deltaspec.diagnostics.findings import DeltaSpecError, Diagnostic

_loop = asyncio._get_running_loop  # noqa: SLF001 - what tells without raising


class Tasks:
    """The tasks that switched a view, and what was attached when each did so last."""

    def __init__(self, state: Callable[[], Any]) -> None:
        self._state = state
        self._left: WeakKeyDictionary[Any, Any] = WeakKeyDictionary()

    def note(self) -> None:
        """Take in a switch."""
        if _loop() is not None and (task := asyncio.current_task()) is not None:
            self._left[task] = self._state()[:2]

    def check(self) -> None:
        """Raise DeltaSpecError (DS456) in a task that finds other deltas attached than it attached itself."""
        if not self._left or _loop() is None:
            return
        left = self._left.get(asyncio.current_task())
        if left is not None and left != (now := self._state()[:2]):
            was, found = (", ".join(map(repr, names)) or "nothing" for names in (left[0], now[0]))
            message = f"this task attached {was}, and another task that shares this view has attached {found} since"
            hint = "give each task a view of its own, view = c.view(), or pass deltas=[...] with each batch"
            raise DeltaSpecError([Diagnostic("DS456", message, file="<model>", suggestion=hint)])
