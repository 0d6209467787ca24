"""Places of findings as a repository sees them: paths from its root, wherever the command ran."""

from __future__ import annotations

import os
from pathlib import Path

_ENDINGS = (".yaml", ".yml", ".json", ".md")


def in_repository(file: str) -> str:
    """Return a file's path from the root of its repository, with forward slashes.

    The root is that of the repository that the working directory lies in, or else the file's own, or else the working
    directory. A file that lies elsewhere stays as it is, and so does what is no file (`<stdin>`, a model's id).
    """
    here = Path.cwd()
    path = Path(os.path.normpath(here / file))
    if not os.path.lexists(path) and not file.endswith(_ENDINGS):
        return file
    path = Path(os.path.realpath(path.parent)) / path.name  # a link to a file has a place of its own
    for root in (_root(here), _root(path.parent), here):
        if root is not None and path.is_relative_to(root):
            return path.relative_to(root).as_posix()
    return Path(file).as_posix()


def _root(folder: Path) -> Path | None:
    """Return the folder, or the nearest one around it, that is the root of a repository or of a work tree of one."""
    return next((above for above in (folder, *folder.parents) if os.path.lexists(above / ".git")), None)
