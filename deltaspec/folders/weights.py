"""The weights of a folder of safetensors: which tensor lies in which shard, and what a model calls it."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from os import PathLike
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from deltaspec.backbone.table import ModuleTable
from deltaspec.diagnostics.findings import DeltaSpecError, Diagnostic
from deltaspec.documents.nearby import did_you_mean
from deltaspec.folders.pieces import joined, pieces

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
_FLOATS = frozenset({torch.float16, torch.bfloat16, torch.float32, torch.float64})


class Tensors(Protocol):
    """Tensors by the names of a model."""

    def find(self, name: str) -> Tensor | None:
        """Return a tensor of a model; None where there is none."""


class Folder:
    """A folder of safetensors. Tensors are mapped from their files, and read when their values are."""

    def __init__(self, folder: str | PathLike[str]) -> None:
        self.path = Path(folder)
        self.files, self.index = self._files()
        self._open: dict[str, Any] = {}
        self.shard: dict[str, str] = {}
        """Name of the file of each tensor, by its key, in the order of the files."""
        for file in self.files:
            for key in self._handle(file).keys():  # noqa: SIM118  (a handle of safetensors, not a mapping)
                self.shard[key] = file
        self._check_index()

    def _files(self) -> tuple[list[str], dict[str, Any] | None]:
        index = self.path / INDEX
        try:
            data = json.loads(index.read_bytes()) if index.exists() else None
            named = None if data is None else sorted({str(file) for file in data["weight_map"].values()})
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise self.failure(f"is no index of shards: {error}", INDEX) from error
        if named is None:
            named = [SINGLE] if (self.path / SINGLE).exists() else []
        if strange := [file for file in named if Path(file).name != file or not file.endswith(".safetensors")]:
            raise self.failure(f"names a file outside of the folder: {strange[0]!r}", INDEX)
        if missing := [file for file in named if not (self.path / file).exists()]:
            raise self.failure(f"is missing, and {INDEX} names it", missing[0])
        if not self.path.is_dir():
            message = "is a file, not a folder" if self.path.exists() else "there is no such folder"
            hint = did_you_mean(self.path, "name a folder of safetensors, as save_pretrained writes it")
            raise DeltaSpecError([Diagnostic("DS554", message, file=str(self.path), suggestion=hint)])
        if not named:
            raise self.failure(f"holds neither {SINGLE} nor {INDEX}", "")
        return named, data

    def _check_index(self) -> None:
        if self.index is None:
            return
        for key, file in self.index["weight_map"].items():
            if self.shard.get(key) != file:
                raise self.failure(f"says that {key} is in {file}, and it is not", INDEX)

    def _handle(self, file: str) -> Any:
        if file not in self._open:
            from safetensors import SafetensorError, safe_open

            try:
                opened: Any = safe_open(str(self.path / file), "pt")
            except (OSError, SafetensorError) as error:
                raise self.failure(f"is no whole file of safetensors: {error}", file) from error
            self._open[file] = opened
        return self._open[file]

    def failure(self, message: str, file: str) -> DeltaSpecError:
        """Return the error (DS554) about one of its files."""
        hint = "name a folder of safetensors, as save_pretrained writes it"
        return DeltaSpecError([Diagnostic("DS554", message, file=str(self.path / file), suggestion=hint)])

    def tensor(self, key: str) -> Tensor:
        """Return a tensor, mapped from its file."""
        found: Tensor = self._handle(self.shard[key]).get_tensor(key)
        return found

    def metadata(self, file: str) -> dict[str, str]:
        """Return what a file says of itself."""
        return dict(self._handle(file).metadata() or {})


class Named:
    """What the tensors of a folder are called in a model: as they are, or with or without the prefix of its base."""

    def __init__(self, folder: Folder, model: nn.Module, table: ModuleTable) -> None:
        self.folder, self._prefix = folder, f"{getattr(model, 'base_model_prefix', '')}."
        self.ties: dict[str, tuple[str, ...]] = {p.fqn: p.tied for row in table.rows for p in row.parameters}
        """The other places of each parameter."""
        self._known = {p.fqn for row in table.rows for p in (*row.parameters, *row.buffers)}
        self._headed = any(name.startswith(self._prefix) for name in self.ties)
        self._model, self._shapes = model, {p.fqn: p.shape for row in table.rows for p in row.parameters}
        self._pieces = self._in_pieces()

    def own_key(self, name: str) -> str | None:
        """Return the key of a tensor under its own name; None where the folder has none."""
        return next((key for key in self._forms(name) if key in self.folder.shard), None)

    def key(self, name: str) -> str | None:
        """Return the key of a tensor, of a tied one perhaps that of another place; None where there is none."""
        places = (name, *self.ties.get(name, ()))
        return next((key for place in places if (key := self.own_key(place)) is not None), None)

    def kept(self, name: str) -> tuple[str, ...]:
        """Return the keys under which the folder keeps a tensor: its own, or those of its pieces, or none."""
        key = self.key(name)
        return self._pieces.get(name, ()) if key is None else (key,)

    def as_kept(self, name: str, value: Tensor) -> Mapping[str, Tensor]:
        """Return a tensor's value by the keys under which the folder keeps it."""
        key = self.key(name)
        return pieces(self._model, name, value) if key is None else {key: value}

    def _in_pieces(self) -> dict[str, tuple[str, ...]]:
        """Return the keys of all tensors that are here under names of transformers' own, or in pieces.

        Pieces of other shapes are none of the tensor's: filled in by number, they would be scrambled.
        """
        found = {}
        for name, shape in self._shapes.items():
            if self.key(name) is None:
                due = pieces(self._model, name, torch.empty(shape, device="meta"))
                if all(k in self.folder.shard and self.folder.tensor(k).shape == v.shape for k, v in due.items()):
                    found[name] = tuple(due)
        return found

    def unnamed(self) -> set[str]:
        """Return the keys of tensors that the model does not have."""
        known = {form for name in self._known for form in self._forms(name)}
        known |= {key for keys in self._pieces.values() for key in keys}
        return self.folder.shard.keys() - known

    def new_key(self, name: str) -> str:
        """Return the key that a tensor would have which the folder does not have yet, named as the others are."""
        forms = self._forms(name)
        others = (self._forms(place) for place in self.ties)
        as_is = any(len(other) > 1 and other[0] in self.folder.shard for other in others)
        return forms[0] if as_is else forms[-1]

    def find(self, name: str) -> Tensor | None:
        """Return a tensor of the model; None where the folder has none."""
        key = self.key(name)
        if key is None and name in self._pieces:
            return joined(self._model, name, self._shapes[name], self.folder.tensor)
        return None if key is None else self.folder.tensor(key)

    def _forms(self, name: str) -> list[str]:
        if self._prefix == ".":
            return [name]
        if name.startswith(self._prefix):
            return [name, name.removeprefix(self._prefix)]
        return [name] if self._headed else [name, self._prefix + name]  # a head stands beside its base

    def refuse_missing(self, names: Iterable[str]) -> None:
        """Raise DeltaSpecError (DS555) for tensors that the folder lacks, or keeps as codes."""
        findings = []
        for name in names:
            held = [self.folder.tensor(key).dtype for key in self.kept(name)]
            codes = [dtype for dtype in held if dtype.is_floating_point and dtype not in _FLOATS]
            if not held:
                message = f"there is no tensor {name} here, under any name"
                hint = "name a folder that the model's own class writes (save_pretrained), or merge in memory"
            elif codes:
                message = f"{name} is kept as {str(codes[0]).removeprefix('torch.')}, which is not merged into"
                hint = "name a folder of plain weights, without quantisation"
            else:
                continue
            findings.append(Diagnostic("DS555", message, file=str(self.folder.path), suggestion=hint))
        if findings:
            raise DeltaSpecError(findings)


class ModuleTensors:
    """The tensors of a model in memory."""

    def __init__(self, model: nn.Module) -> None:
        self._state: Mapping[str, Tensor] = model.state_dict(keep_vars=False)

    def find(self, name: str) -> Tensor | None:
        """Return a tensor; None where there is none."""
        return self._state.get(name)
