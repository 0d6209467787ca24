"""Paths that are not there: what lies beside them under nearly the same name."""

from __future__ import annotations

import os
from os import PathLike

from deltaspec.diagnostics.wording import closest


def near_path(path: str | PathLike[str]) -> str | None:
    """Return what a path that is not there is most likely a misspelling of; None where nothing beside it is near."""
    folder, name = os.path.split(os.path.expanduser(os.fspath(path)).rstrip(os.sep))
    try:
        found = closest(name, os.listdir(folder or os.curdir))
    except (OSError, ValueError):  # nor is its folder there, or it is no path at all: a NUL
        return None
    return None if found is None else os.path.join(folder, found)


def did_you_mean(path: str | PathLike[str], otherwise: str) -> str:
    """Return the suggestion about a path that is not there: what is near, and what else would do."""
    near = None if os.path.lexists(path) else near_path(path)
    return otherwise if near is None else f"did you mean {near}? or {otherwise}"
