"""Writing files so that the old or the new content is there at any moment, never half of one."""

from __future__ import annotations

import ctypes
import os
import secrets
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType

_FEW = 32
"""Files that are brought to the disk one by one; for more, one call for their whole file system is quicker."""


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


class Together:
    """Files of one directory that appear together: written, brought to the disk at once, then given their names.

    A context; whatever raises in it leaves none of those behind that have no name yet.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._waiting: dict[Path, Path] = {}
        """Files that have no name yet, and the names that they get."""

    def add(self, name: str, content: bytes) -> None:
        """Write a file, for now without its name."""
        temporary = self._folder / f".{name}.{secrets.token_hex(8)}"
        self._waiting[temporary] = self._folder / name
        with os.fdopen(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666), "wb") as file:
            file.write(content)

    def appear(self, name: str, content: bytes) -> None:
        """Add a file that makes the others valid, and give all their names: to this one when theirs are on the disk."""
        self.add(name, content)
        _sync_files(self._folder, list(self._waiting))
        *others, (last, place) = self._waiting.items()
        for temporary, target in others:
            os.replace(temporary, target)
            del self._waiting[temporary]
        sync(self._folder)
        os.replace(last, place)
        del self._waiting[last]
        sync(self._folder)

    def __enter__(self) -> Together:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        for temporary in self._waiting:
            temporary.unlink(missing_ok=True)


def _sync_files(folder: Path, files: list[Path]) -> None:
    """Bring the content of files to the disk. Raises OSError."""
    whole = getattr(ctypes.CDLL(None, use_errno=True), "syncfs", None) if sys.platform == "linux" else None
    if whole is None or len(files) <= _FEW:
        for file in files:
            handle = os.open(file, os.O_RDWR)
            try:
                os.fsync(handle)
            finally:
                os.close(handle)
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        if whole(handle) != 0:
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number), str(folder))
    finally:
        os.close(handle)


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
