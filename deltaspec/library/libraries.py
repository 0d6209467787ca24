"""All libraries of a model: which of their deltas are in memory, when they come, and when they may go."""

from __future__ import annotations

import gc
import os
from collections import Counter, OrderedDict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from os import PathLike
from pathlib import Path
from typing import Any

import torch

from deltaspec.deltas.modules import Delta
from deltaspec.diagnostics.findings import DeltaSpecError, Diagnostic, require_known
from deltaspec.library.catalogue import SavedDelta, Source, refuse_taken
from deltaspec.library.entries import Reader, Template
from deltaspec.library.opened import Opened, Staged, limits
from deltaspec.library.pins import Pins
from deltaspec.runtime.ports import View
from deltaspec.runtime.shared import Shared
from deltaspec.storage.matching import Match, checked


class Libraries:
    """All libraries of one model, and of all its views."""

    def __init__(self, shared: Shared) -> None:
        self._shared = shared
        self.opened: list[Opened] = []
        self._of: dict[str, Opened] = {}
        """Directory of each known name."""
        self._exposed: set[str] = set()
        """Names whose tensors a user was given."""
        self._pins = Pins()
        self._lock = shared.lock

    def __deepcopy__(self, memo: dict[int, Any]) -> Libraries:
        """Copy with what is loaded; directories are shared."""
        shared = memo[id(self._shared)]
        twin = memo[id(self)] = type(self)(shared)
        for opened in self.opened:
            reader = Reader(shared, opened.reader.inputs)
            copied = replace(opened, entries=dict(opened.entries), reader=reader, loaded=OrderedDict(opened.loaded))
            twin.opened.append(copied)
            twin._of.update(dict.fromkeys(copied.entries, copied))  # noqa: SLF001
        return twin

    def __contains__(self, name: object) -> bool:
        return name in self._of

    @property
    def loaded(self) -> list[str]:
        """Names in memory, in the order of application."""
        return [name for opened in self.opened for name in opened.entries if name in opened.loaded]

    def open(
        self,
        directory: str | PathLike[str],
        names: tuple[str, ...],
        limit: int | str | None,
        by: str,
        example_inputs: Any,
        match: Match,
        *,
        preload: bool = False,
    ) -> Opened:
        """Make the names of a directory known. Raises DeltaSpecError with all findings, and then none is."""
        if by not in ("delta", "folder", "identity"):
            raise ValueError(f"by is 'delta', 'folder' or 'identity', not {by!r}")
        count, size = limits(limit)
        source = Source(Path(os.path.abspath(directory)), by, names, checked(match))  # the current directory may change
        with self._lock:
            shared = self._shared
            entries = source.entries(shared.any_view(), shared.plan, example_inputs)
            refuse_taken(entries, self._taken(None))
            reader = Reader(shared, example_inputs)
            opened = Opened(os.fspath(directory), source, {}, reader, count, size)
            self.opened.append(opened)
            self._know(opened, entries)
            if preload:
                try:
                    self.require(entries)
                except BaseException:
                    self.close(opened)
                    raise
            return opened

    def refresh(self, opened: Opened, names: tuple[str, ...]) -> None:
        """Take in deltas, by name or all, that were saved again or came since; forget those that are gone.

        Raises DeltaSpecError with all findings, and then nothing changed: what is wrong with the directory, as when it
        was opened; deltas that are in use and would change (DS532).
        """
        with self._lock:
            shared = self._shared
            entries = opened.source.entries(shared.any_view(), shared.plan, opened.reader.inputs)
            before = opened.entries
            require_known(names, before | entries)
            asked = set(names or before | entries)
            same = {name for name in before if name in entries and entries[name].is_as(before[name])}
            other = [name for name in asked - same if name in before]
            coming = {name: entry for name, entry in entries.items() if name in asked or name in same}
            refuse_taken(coming, self._taken(opened))
            self.drop(opened, tuple(name for name in other if name in opened.loaded))
            for name in other:
                if name not in entries:
                    del before[name], self._of[name], shared.order[name]
            self._know(opened, coming)

    def _know(self, opened: Opened, entries: dict[str, SavedDelta]) -> None:
        """Take in the names of deltas, behind those that are known."""
        order = self._shared.order
        opened.entries.update(entries)
        self._of.update(dict.fromkeys(entries, opened))
        first = max(order.values(), default=-1) + 1
        new = (name for name in entries if name not in order)
        order.update({name: first + index for index, name in enumerate(new)})

    def _taken(self, opened: Opened | None) -> dict[str, str | None]:
        """Return the names that others than a library have: the directories they are in, None for compiled deltas."""
        found: dict[str, str | None] = dict.fromkeys(self._shared.order)
        found |= {name: other.directory for name, other in self._of.items()}
        return {name: where for name, where in found.items() if opened is None or self._of.get(name) is not opened}

    def refuse_attached(self, active: Iterable[str], what: str) -> None:
        """Raise DeltaSpecError (DS533) where a delta of a library is attached: the result would lack it."""
        found = [name for name in active if name in self._of]
        if found:
            names = ", ".join(map(repr, found))
            message = f"the model cannot be {what} with {names} attached, which a library holds"
            raise DeltaSpecError([Diagnostic("DS533", message, suggestion=f"c.detach({names}) first")])

    def close(self, opened: Opened) -> None:
        """Forget a directory. Raises DeltaSpecError (DS532) where deltas of it are in use."""
        with self._lock:
            if opened not in self.opened:
                return
            self.drop(opened, tuple(opened.loaded))
            self.opened.remove(opened)
            for name in opened.entries:
                del self._of[name], self._shared.order[name]
            opened.entries = {}
            self._shared.sweep()

    def require(self, names: Iterable[str], *, leaving: View | None = None) -> None:
        """Load those of these deltas that are in libraries and not in memory; all or none.

        `leaving`: what is attached in this view will not be in a moment, unless it is among these.

        Raises DeltaSpecError with the findings of all: files missing, damaged or malformed, specs that do not fit this
        backbone, tensors missing, surplus, of another shape or dtype, or not finite; a limit that is too small (DS531).
        """
        if not self.opened:
            return
        with self._lock:
            asked: dict[Opened, dict[str, None]] = {}
            for name in names:
                if (opened := self._of.get(name)) is not None:
                    asked.setdefault(opened, {})[name] = None
            staged: dict[Opened, list[Staged]] = {}
            findings: list[Diagnostic] = []
            for opened, wanted in asked.items():
                staged[opened] = self._staged(opened, wanted, findings, leaving)
            if findings:
                raise DeltaSpecError(findings)
            for opened, new in staged.items():
                if new:
                    kept = {*asked[opened], *self._kept(opened)}
                    self._make_way(opened, kept, [one.template for one in new])
                    self._take_in(opened, new)
                self.touch(asked[opened])

    @contextmanager
    def in_memory(self, names: Iterable[str], view: View) -> Iterator[None]:
        """Have these deltas in memory for what attaches them in a view; those that leave go afterwards."""
        if not self.opened:
            yield
            return
        self.require(names, leaving=view)
        try:
            yield
        finally:
            self._trim()

    def _staged(
        self, opened: Opened, wanted: Iterable[str], findings: list[Diagnostic], leaving: View | None
    ) -> list[Staged]:
        """Read and check what is not in memory."""
        before = len(findings)
        staged = opened.read(wanted, findings)
        if len(findings) == before:
            templates = self._staying(opened, wanted, leaving)
            if opened.exceeds([*templates, *(new.template for new in staged)]):
                gc.collect()  # a model is full of cycles, so a view that nobody has any more may still be there
                templates = self._staying(opened, wanted, leaving)
            if opened.exceeds([*templates, *(new.template for new in staged)]):
                findings.append(opened.too_many(len(templates) + len(staged)))
        return staged

    def _staying(self, opened: Opened, wanted: Iterable[str], leaving: View | None) -> list[Template]:
        """Return what of the deltas in memory stays there while these are in use."""
        kept = {*wanted, *self._kept(opened, leaving)}
        return [opened.loaded[name] for name in list(opened.loaded) if name in kept]

    def _make_way(self, opened: Opened, kept: set[str], coming: list[Template]) -> None:
        """Drop those that were not used for longest, until there is room."""
        for name in [name for name in list(opened.loaded) if name not in kept]:
            if not opened.exceeds([*opened.loaded.values(), *coming]):
                break
            self._forget(opened, name)

    def _trim(self) -> None:
        """Drop what is beyond the limits, now that it may be."""
        with self._lock:
            for opened in self.opened:
                if opened.exceeds(list(opened.loaded.values())):
                    self._make_way(opened, self._kept(opened), [])

    @torch.no_grad()
    def _take_in(self, opened: Opened, new: list[Staged]) -> None:
        shared = self._shared
        left = Counter(staged.template for staged in new)
        for staged in new:
            template = staged.template
            outcome = opened.entries[staged.name].outcome
            notes = (*template.planned.notes, *outcome.notes)
            planned = replace(template.planned, name=staged.name, notes=notes, let_pass=outcome.let_pass)
            shared.add(planned, template.document(staged.name), proven=opened.reader.proven)
            stack, row = shared.stacks.hold(staged.name, template.layout, left[template], opened.count)
            left[template] -= 1
            for piece, group, offset in staged.contents.moves(template.layout):
                stack.flats[group][row, offset : offset + piece.count].copy_(piece.of(staged.file))
            opened.loaded[staged.name] = template

    def drop(self, opened: Opened, names: tuple[str, ...]) -> None:
        """Take deltas out of memory. Raises DeltaSpecError (DS532) for those in use, and then drops none."""
        with self._lock:
            kept, trained = self._kept(opened), self._trained(opened)
            if not kept.isdisjoint(names):
                gc.collect()  # of what nobody has any more, nothing is in use
                kept, trained = self._kept(opened), self._trained(opened)
            in_rows = self._pins.names()
            if used := [opened.in_use(name, name in trained, name in in_rows) for name in names if name in kept]:
                raise DeltaSpecError(used)
            for name in names:
                if name in opened.loaded:
                    self._forget(opened, name)

    def _forget(self, opened: Opened, name: str) -> None:
        if not self._shared.discard(name):
            return
        del opened.loaded[name]
        self._shared.stacks.drop(name, again=name not in self._exposed)
        self._exposed.discard(name)

    def _trained(self, opened: Opened) -> list[str]:
        """Return the names of loaded deltas that a user has put into training."""
        exposed = [name for name in self._exposed if name in opened.loaded]
        return [name for name in exposed if any(p.requires_grad for p in self.delta(name).parameters())]

    def pin(self, holder: object, names: Iterable[str]) -> None:
        """Keep deltas in memory for as long as an object lives that knows where they lie."""
        self._pins.add(holder, [name for name in names if name in self._of])

    def _kept(self, opened: Opened, leaving: View | None = None) -> set[str]:
        """Return the names of loaded deltas that must not be dropped."""
        active = self._shared.attached(leaving)
        return {*active, *self._pins.names(), *self._trained(opened)} & opened.loaded.keys()

    def touch(self, names: Iterable[str]) -> None:
        """Note that deltas are used now. Switches call this without the lock, so readers take `loaded` in one step."""
        for name in names:
            if (opened := self._of.get(name)) is not None:
                with suppress(KeyError):  # another view dropped it just now; `Active.switch` sees that
                    opened.loaded.move_to_end(name)

    def delta(self, name: str) -> Delta:
        """Return a loaded delta as a module; KeyError where it is not loaded."""
        with self._lock:
            opened = self._of.get(name)
            template = None if opened is None else opened.loaded.get(name)
            if template is None:
                raise KeyError(name)
            return self._shared.stacks.show(name, template.buffers)

    def expose(self, name: str) -> Delta:
        """Return a loaded delta to a user, who may keep its tensors: their memory is not written again."""
        with self._lock:
            delta = self.delta(name)
            self._exposed.add(name)
            return delta

    def moved(self) -> None:
        """Follow the backbone to another device or dtype."""
        for opened in self.opened:
            opened.reader.moved()
