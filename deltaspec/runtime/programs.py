"""The programs of a view that are kept: by active set, and by the names that a switch was asked for."""

from __future__ import annotations

from typing import Any

from deltaspec.runtime.program import Filled, Footprint, Program

_MOST = 1024
"""Programs that are kept at least."""


class Programs:
    """Finished programs."""

    def __init__(self) -> None:
        self._made: dict[tuple[tuple[str, ...], tuple[str, ...]], Program] = {}
        """By the active set, in order of application, and those of it that are not at full strength."""
        self.ready: dict[tuple[Any, ...], Program] = {}
        """By names as they were given, checked: active sets that need nothing but their program."""
        self._footprints: dict[Filled, Footprint] = {}

    def get(self, names: tuple[str, ...], scaled: tuple[str, ...]) -> Program | None:
        """Return the program of an active set, if it is kept."""
        return self._made.get((names, scaled))

    def keep(self, program: Program, names: tuple[str, ...], scaled: tuple[str, ...]) -> None:
        """Finish and keep the program of an active set."""
        program.finish(names, self._footprints)
        self._made[names, scaled] = program

    def limit(self, deltas: int, active: tuple[str, ...]) -> None:
        """Forget the programs made first, where there are many more than deltas: each holds what it binds."""
        most = max(_MOST, 2 * deltas)
        for programs in (self._made, self.ready):
            while len(programs) > most:
                del programs[next(names for names, program in programs.items() if program.names != active)]

    def unready(self, name: str) -> None:
        """Let no switch to a delta be quick any more."""
        _forget(self.ready, name)

    def forget(self, name: str) -> None:
        """Forget all that was made for a delta."""
        _forget(self._made, name)

    def clear(self) -> None:
        """Forget all."""
        self._made.clear()
        self.ready.clear()
        self._footprints.clear()

    def __len__(self) -> int:
        return max(len(self._made), len(self.ready))


def _forget(programs: dict[Any, Program], name: str) -> None:
    for key in [key for key, program in programs.items() if name in program.names]:
        del programs[key]
