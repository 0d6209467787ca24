"""What a saved delta of a library is on this backbone, and its tensors."""

from __future__ import annotations

import json
from collections.abc import Collection
from dataclasses import dataclass, replace
from mmap import mmap
from typing import Any

import torch
from torch import Tensor, nn

from deltaspec.backbone.observations import Observations
from deltaspec.backbone.table import ModuleTable
from deltaspec.backbone.tabulate import tabulate
from deltaspec.deltas.finite import is_finite
from deltaspec.deltas.initial import build_delta
from deltaspec.deltas.stack import Layout
from deltaspec.diagnostics.findings import DeltaSpecError, Diagnostic
from deltaspec.language.load import load
from deltaspec.language.model import DeltaSpec
from deltaspec.library.catalogue import SavedDelta
from deltaspec.names.prefixes import Prefix
from deltaspec.planning.planned import PlannedDelta
from deltaspec.planning.resolve import resolve
from deltaspec.runtime.copies import without_deltas
from deltaspec.runtime.shared import Shared
from deltaspec.storage.load import match, missing_and_surplus, saved_keys
from deltaspec.storage.specs import moved


@dataclass(frozen=True, slots=True, eq=False)
class Template:
    """Saved deltas alike but for name and values, as planned on a backbone."""

    planned: PlannedDelta
    tensors: dict[str, Tensor]
    """Tensors of such a delta, by storage key, on the meta device."""
    layout: Layout
    """Layout of its rows, on the backbone's device."""
    buffers: frozenset[str]
    """Keys of tensors that are no parameters."""
    size: int
    """Bytes of its tensors."""
    prefix: Prefix
    """What the saved names read here."""
    spec: DeltaSpec
    """The spec with this delta alone."""

    def document(self, name: str) -> DeltaSpec:
        """Return the spec of such a delta of this name."""
        return self.spec.model_copy(update={"deltas": (self.spec.deltas[0].model_copy(update={"name": name}),)})


@dataclass(frozen=True, slots=True)
class Piece:
    """A run of values in a file, and the tensor it belongs to."""

    key: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int
    """Bytes from the start of the file."""
    count: int
    """Number of values."""

    @property
    def flat(self) -> Piece:
        """The same values in one dimension."""
        return replace(self, shape=(self.count,))

    def is_before(self, other: Piece) -> bool:
        """Return whether another piece follows at once, in the same dtype."""
        return self.dtype == other.dtype and self.begin + self.count * self.dtype.itemsize == other.begin

    def with_next(self, other: Piece) -> Piece:
        """Return both as one flat piece."""
        return replace(self, shape=(self.count + other.count,), count=self.count + other.count)

    def of(self, content: mmap) -> Tensor:
        """Return the tensor, without copying it."""
        if not self.count:
            return torch.empty(self.shape, dtype=self.dtype, device="cpu")
        return torch.frombuffer(content, dtype=self.dtype, count=self.count, offset=self.begin).view(self.shape)


class Contents:
    """Places of all tensors in files of one header."""

    def __init__(self, pieces: tuple[Piece, ...], size: int) -> None:
        self.pieces, self._size = pieces, size
        self.runs = _runs(pieces)
        """All values as few flat pieces."""
        self._moves: dict[Layout, list[tuple[Piece, int, int]]] = {}

    def fills(self, file: mmap) -> bool:
        """Return whether a file of this header is as long as it says."""
        return len(file) == self._size

    def moves(self, layout: Layout) -> list[tuple[Piece, int, int]]:
        """Return how to fill a row: (piece, group, offset), as few as possible."""
        found = self._moves.get(layout)
        if found is None:
            found = self._moves[layout] = []
            for piece in self.pieces:
                slot = layout.slots[piece.key]
                if found:
                    last, group, offset = found[-1]
                    if group == slot.group and offset + last.count == slot.offset and last.is_before(piece):
                        found[-1] = last.with_next(piece), group, offset
                        continue
                found.append((piece.flat, slot.group, slot.offset))
        return found


class Reader:
    """Reads and checks entries; what many have in common is looked at once."""

    def __init__(self, shared: Shared, example_inputs: Any) -> None:
        self._shared, self.inputs = shared, example_inputs
        self._templates: dict[str, Template] = {}
        self._contents: dict[tuple[bytes, Template], Contents] = {}
        """Contents by the header of the file, and the template that it was checked against."""
        self._observations: Observations | None = None
        self._table: ModuleTable | None = None

    def moved(self) -> None:
        """Forget what depends on the backbone's device and dtype."""
        self._templates.clear()
        self._contents.clear()

    @property
    def proven(self) -> bool:
        """Whether a forward showed that the planned sites are reached."""
        return self._observations is None or self._observations.failure is None

    def template(self, entry: SavedDelta, findings: list[Diagnostic]) -> Template | None:
        """Plan an entry's saved spec onto the backbone; None, with findings, where that fails."""
        content, problems = entry.saved.read(entry.own, "spec")
        findings += problems
        if content is None:
            return None
        file = entry.saved.entry[entry.own]["spec"]
        try:
            data = json.loads(content)
            deltas = [delta["name"] for delta in data["deltas"]]
            if entry.own not in deltas:
                raise KeyError(entry.own)
            for delta in data["deltas"]:
                delta.pop("provenance", None)  # which changes nothing: those alike but for it are alike
            data = moved(entry.saved, data, {entry.own: entry.outcome.prefix}, self._modules())
            if len(deltas) == 1:  # alone in its spec, it may be called anything
                data["deltas"][0] = {**data["deltas"][0], "name": "delta"}
        except DeltaSpecError as error:
            findings += error.diagnostics
            return None
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            findings.append(entry.saved.finding("DS522", f"is no resolved spec: {error}", "save again", file))
            return None
        wanted = entry.own if len(deltas) > 1 else "delta"
        prefix = entry.outcome.prefix
        identity = json.dumps([wanted, data, prefix.saved, prefix.here], sort_keys=True)
        found = self._templates.get(identity)
        if found is None:
            try:
                found = self._templates[identity] = self._planned(data, wanted, prefix)
            except DeltaSpecError as error:
                path = str(entry.saved.folder / file)
                findings += [replace(d, file=path, line=0, column=0) for d in error.diagnostics]
        return found

    def _modules(self) -> Collection[str]:
        return self._shared.any_host().modules

    def _planned(self, data: dict[str, Any], name: str, prefix: Prefix) -> Template:
        host = self._shared.any_host()
        if self._observations is None or self._table is None:
            plain = without_deltas(host)  # as it is, which may not be as it was compiled
            self._observations, self._table = Observations(plain, self.inputs), tabulate(plain)
        plan = resolve((load(data),), self._table, self._observations)
        # What a derived delta was computed to be is in its tensors.
        planned = replace(plan[name], attached=False, derived=None)
        delta = build_delta(planned, 0, host.backbone, drawn=False)
        tensors = dict(delta.tensors())
        buffers = frozenset(key for key, tensor in tensors.items() if not isinstance(tensor, nn.Parameter))
        empty = {key: torch.empty_like(tensor, device="meta") for key, tensor in tensors.items()}
        size = sum(tensor.nbytes for tensor in tensors.values())
        return Template(planned, empty, Layout.of(tensors), buffers, size, prefix, plan.alone(name, {name}).specs[0])

    def read(self, entry: SavedDelta, template: Template, findings: list[Diagnostic]) -> tuple[mmap, Contents] | None:
        """Map an entry's tensors, all checked: (file, where each lies in it); None, with findings, where that fails."""
        findings += entry.saved.read(entry.own, "lock")[1]
        file, problems = entry.saved.map(entry.own)
        findings += problems
        if file is None:
            if problems[0].code == "DS522":  # what it still says of its tensors may tell more
                missing_and_surplus(entry.saved, entry.own, template.tensors, findings, template.prefix)
            return None
        length = 8 + int.from_bytes(file[:8], "little")
        header = file[:length]
        contents = self._contents.get((header, template))
        if contents is not None and contents.fills(file) and all(is_finite(p.of(file)) for p in contents.runs):
            return file, contents
        # The first of its kind, or something is wrong: every key is accounted for.
        before = len(findings)
        match(entry.saved, entry.own, template.tensors, findings, template.prefix)
        if len(findings) > before:
            return None
        values = entry.saved.tensors(entry.own, findings)
        if values is None:
            return None
        keys = {old: new for new, old in saved_keys(template.tensors, values, template.prefix).items()}
        named = entry.saved.renamed(entry.own)
        offsets = ((named.get(key, key), about) for key, about in json.loads(header[8:]).items())
        begins = {key: length + about["data_offsets"][0] for key, about in offsets if key in values}
        pieces = [Piece(keys[key], v.dtype, tuple(v.shape), begins[key], v.numel()) for key, v in values.items()]
        contents = Contents(tuple(sorted(pieces, key=lambda piece: piece.begin)), len(file))
        self._contents[header, template] = contents
        return file, contents


def _runs(pieces: tuple[Piece, ...]) -> list[Piece]:
    joined: list[Piece] = []
    for piece in pieces:
        if joined and joined[-1].is_before(piece):
            joined[-1] = joined[-1].with_next(piece)
        else:
            joined.append(piece.flat)
    return joined
