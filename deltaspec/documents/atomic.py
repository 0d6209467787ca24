"""Writing a file so that the old or the new content is there at any moment, never half of one."""

from __future__ import annotations

import os
import secrets
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


def write_atomically(path: Path, content: bytes) -> None:
    """Replace a file's content at once. Raises OSError, and then the old file is untouched."""
    path = Path(os.path.realpath(path))
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with suppress(FileNotFoundError):
            os.unlink(temporary)
        raise


def sync(folder: Path) -> None:
    """Bring the names in a directory to the disk, so that no later change is there before them."""
    if sys.platform == "win32":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):  # some network file systems cannot
            os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def alone_in(folder: Path) -> Iterator[bool]:
    """Wait until no other writer, of any process, is in this context for a directory; leaves no file behind.

    Yields whether that is sure: where directories cannot be locked (Windows, some network file systems), it does not
    wait.
    """
    if sys.platform == "win32":
        yield False
        return
    import fcntl  # which Windows has not

    handle = os.open(folder, os.O_RDONLY)
    _held.add(handle)
    try:
        alone = True
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)
        except OSError:
            alone = False
        yield alone
    finally:
        _held.discard(handle)
        with suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_UN)  # closing it is not enough: a process forked meanwhile has it, too
        os.close(handle)


def _close_held() -> None:
    """Let go of what the parent has locked, in a process that was forked meanwhile."""
    while _held:
        os.close(_held.pop())


_held: set[int] = set()
"""Handles of the directories that this process has locked, or waits for."""
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_close_held)
