"""A folder of adapters: found by name or by content, checked, and given out as copies that nobody changes."""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from functools import cached_property
from pathlib import Path
from threading import Lock

from deltaspec import DeltaSpecError, Diagnostic
from deltaspec_vllm.held import Held, held_in

_NAME = re.compile(r"[^\W_][\w.%-]{0,199}", re.ASCII)
"""Names of folders that are looked up: no separators, and no dot in front."""
_BY_CONTENT = re.compile(r"(content|sha256):[0-9a-f]{64}")

Check = Callable[[Path, str, int | None], Iterable[Diagnostic]]
Export = Callable[[Path, Path, str, tuple[str, ...]], object]


class Refused(Exception):
    """An adapter is there, and must not be served: the text says why."""


class Shelf:
    """Adapters of one folder, each in a folder of its own: as PEFT writes it, or as `c.save` does."""

    def __init__(
        self,
        folder: str | os.PathLike[str],
        max_rank: int | None = None,
        check: Check | None = None,
        export: Export | None = None,
    ) -> None:
        """`check` returns what is wrong with an adapter on a base; left out, deltaspec's rules for vLLM.

        `export` writes saved deltas, by name or those that were attached, as such an adapter; left out, deltaspec's
        export for vLLM. Raises ValueError where the folder is none.
        """
        self._root = Path(folder).resolve()
        if not self._root.is_dir():
            raise ValueError(f"DELTASPEC_LIBRARY={folder}: there is no such folder")
        self._max_rank = max_rank
        self._check, self._export = check or _rules_for_vllm, export or _export_for_vllm
        self._served: dict[tuple[str, tuple[str, ...], str], Path] = {}
        self._lock = Lock()

    def find(self, name: str, base: str) -> Path | None:
        """Return a checked adapter, by its name or its content, as PEFT writes it; None where there is none.

        Saved deltas are exported at their first request, and what came of it is kept by their content. Raises Refused
        with all reasons.
        """
        with self._lock:
            found = self._by_content(name) if _BY_CONTENT.fullmatch(name) else self._by_name(name)
            if found is None:
                return None
            held, deltas = found
            key = held.content, deltas, base
            if key not in self._served:
                self._served[key] = self._made(name, held, deltas, base)
            return self._served[key]

    def _by_name(self, name: str) -> tuple[Held, tuple[str, ...]] | None:
        held = held_in(self._root / name) if _NAME.fullmatch(name) else None
        return None if held is None else (held, ())

    def _by_content(self, name: str) -> tuple[Held, tuple[str, ...]] | None:
        """Find a folder by what it holds, or a single delta by the identity that its manifest has of it."""
        for held in self._all():
            if held.content == name:
                return held, ()
            if delta := held.deltas.get(name):
                return held, (delta,)
        return None

    def _all(self) -> Iterator[Held]:
        folders = (folder for folder in sorted(self._root.iterdir()) if _NAME.fullmatch(folder.name))
        yield from (held for held in map(held_in, folders) if held is not None)

    @cached_property
    def _copies(self) -> tempfile.TemporaryDirectory[str]:
        """Where copies are: what was checked is what is loaded, also when vLLM dropped an adapter and reads it again.

        Made with the first copy, since vLLM registers plugins in each of its processes, and asks them in one.
        """
        return tempfile.TemporaryDirectory(prefix="deltaspec-served-")

    def _made(self, name: str, held: Held, deltas: tuple[str, ...], base: str) -> Path:
        """Copy an adapter, or export what is saved, and check that: only what is right stays."""
        place = Path(tempfile.mkdtemp(dir=self._copies.name))
        adapter = place / "adapter"
        try:
            if held.is_saved:
                held.copy_to(place / "saved")
                self._export(place / "saved", adapter, base, deltas)
                shutil.rmtree(place / "saved")
            else:
                held.copy_to(adapter)
            findings = [*self._check(adapter, base, self._max_rank)]
        except DeltaSpecError as error:
            findings = [*error.diagnostics]
        except BaseException:
            shutil.rmtree(place)
            raise
        if findings:
            shutil.rmtree(place)
            raise Refused(f"the adapter {name!r} is not served: {'; '.join(map(_in_a_line, findings))}")
        return adapter


def _rules_for_vllm(adapter: Path, base: str, max_rank: int | None) -> list[Diagnostic]:
    from deltaspec.engines import check

    return check(adapter, base, "vllm", max_rank)


def _export_for_vllm(saved: Path, adapter: Path, base: str, deltas: tuple[str, ...]) -> None:
    """Do what `deltaspec export SAVED --for vllm -o ADAPTER --model BASE` does. Raises DeltaSpecError.

    Deltas that are named were asked for by their identities, which are computed again: a manifest may say anything.
    """
    from deltaspec.compiler.export import export
    from deltaspec.storage.identity import identity_of
    from deltaspec.storage.saved import SavedSet

    for delta in deltas:
        identity_of(SavedSet(saved), delta)
    export(saved, adapter, "peft", base, deltas, engine="vllm")


def _in_a_line(finding: Diagnostic) -> str:
    """Put a finding into words that name no path of the server."""
    hint = f" ({finding.suggestion})" if finding.suggestion else ""
    return f"[{finding.code}] {finding.message}{hint}"
