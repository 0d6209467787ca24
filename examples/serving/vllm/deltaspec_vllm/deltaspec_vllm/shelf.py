"""A folder of adapters: found by name or by content, checked, and given out as copies that nobody changes."""

from __future__ import annotations

import hashlib
import os
import re
import tempfile
from collections.abc import Callable, Iterable
from functools import cached_property
from pathlib import Path
from threading import Lock

from deltaspec import DeltaSpecError, Diagnostic

FILES = ("adapter_config.json", "adapter_model.safetensors")
_NAME = re.compile(r"[^\W_][\w.%-]{0,199}", re.ASCII)
"""Names of folders that are looked up: no separators, and no dot in front."""
_BY_CONTENT = re.compile(r"sha256:[0-9a-f]{64}")

Check = Callable[[Path, str, int | None], Iterable[Diagnostic]]


class Refused(Exception):
    """An adapter is there, and must not be served: the text says why."""


class Shelf:
    """Adapters of one folder, each in a folder of its own as PEFT writes it."""

    def __init__(self, folder: str | os.PathLike[str], max_rank: int | None = None, check: Check | None = None) -> None:
        """`check` returns what is wrong with an adapter on a base; left out, deltaspec's rules for vLLM.

        Raises ValueError where the folder is none.
        """
        self._root = Path(folder).resolve()
        if not self._root.is_dir():
            raise ValueError(f"DELTASPEC_LIBRARY={folder}: there is no such folder")
        self._max_rank = max_rank
        self._check = check or _rules_for_vllm
        self._checked: dict[tuple[str, str], Path] = {}
        self._lock = Lock()

    def find(self, name: str, base: str) -> Path | None:
        """Return a checked copy of an adapter, by its name or its content; None where there is none.

        Raises Refused with all reasons.
        """
        with self._lock:
            if _BY_CONTENT.fullmatch(name):
                found = (self._read(folder) for folder in sorted(self._root.iterdir()) if _NAME.fullmatch(folder.name))
                content = next((read for read in found if read is not None and identity(read) == name), None)
            else:
                content = self._read(self._root / name) if _NAME.fullmatch(name) else None
            if content is None:
                return None
            key = identity(content), base
            if key not in self._checked:
                self._checked[key] = self._copied(name, content, base)
            return self._checked[key]

    @cached_property
    def _copies(self) -> tempfile.TemporaryDirectory[str]:
        """Where copies are: what was checked is what is loaded, also when vLLM dropped an adapter and reads it again.

        Made with the first copy, since vLLM registers plugins in each of its processes, and asks them in one.
        """
        return tempfile.TemporaryDirectory(prefix="deltaspec-served-")

    def _read(self, folder: Path) -> dict[str, bytes] | None:
        """Return the files of an adapter; None where there is no folder of this name, or it leads out of the shelf."""
        if folder.is_symlink() or not folder.is_dir():
            return None
        paths = [folder / name for name in FILES]
        if any(path.is_symlink() or not path.is_file() for path in paths):
            return None
        return {path.name: path.read_bytes() for path in paths}

    def _copied(self, name: str, content: dict[str, bytes], base: str) -> Path:
        folder = Path(tempfile.mkdtemp(dir=self._copies.name))
        for file, data in content.items():
            (folder / file).write_bytes(data)
        try:
            findings = [*self._check(folder, base, self._max_rank)]
        except DeltaSpecError as error:
            findings = [*error.diagnostics]
        if findings:
            for file in content:
                (folder / file).unlink()
            folder.rmdir()
            raise Refused(f"the adapter {name!r} is not served: {'; '.join(map(_in_a_line, findings))}")
        return folder


def identity(content: dict[str, bytes]) -> str:
    """Return the name that an adapter has by its content."""
    whole = hashlib.sha256()
    for file in FILES:
        whole.update(hashlib.sha256(content[file]).digest())
    return f"sha256:{whole.hexdigest()}"


def identity_of(folder: Path) -> str:
    """Return the name that the adapter in a folder has by its content."""
    return identity({file: (folder / file).read_bytes() for file in FILES})


def _rules_for_vllm(adapter: Path, base: str, max_rank: int | None) -> list[Diagnostic]:
    from deltaspec.engines import check

    return check(adapter, base, "vllm", max_rank)


def _in_a_line(finding: Diagnostic) -> str:
    """Put a finding into words that name no path of the server."""
    hint = f" ({finding.suggestion})" if finding.suggestion else ""
    return f"[{finding.code}] {finding.message}{hint}"
