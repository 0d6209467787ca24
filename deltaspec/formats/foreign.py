"""A foreign directory while it is read for a base model: each key of its files is taken, or there is a finding."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from functools import reduce
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deltaspec.formats.base import Base
from deltaspec.formats.incoming import Incoming, IncomingDelta, IncomingSite
from deltaspec.formats.older_names import of_today
from deltaspec.formats.unread import Unread
from deltaspec.names.folding import shown
from deltaspec.names.paths import below
from deltaspec.names.prefixes import Prefix, prefixes

if TYPE_CHECKING:
    from torch import Tensor

_WRAPPERS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
"""Segments that torch.compile, FSDP and activation checkpointing put into names."""

_COMPUTED = ("float16", "bfloat16", "float32", "float64")
"""Types that torch computes in everywhere."""


class Foreign(Unread):
    """Keys are taken one by one, and `finish` says which were not."""

    def __init__(self, folder: Path, base: Base, name: str, kind: str) -> None:
        super().__init__(folder)
        self.base, self.name = base, name
        self.weights: dict[str, Tensor] = {}
        """Tensors by name; those that were taken are gone."""
        self.incoming = Incoming(folder, kind)
        self.file = ""
        """Name of the file of tensors."""
        self.prefix = Prefix()
        """The saved model in this one, as far as places were asked for."""

    def load(self, files: Sequence[str]) -> None:
        """Read the first of these files that there is. Raises DeltaSpecError."""
        held = [file for file in files if (self.folder / file).exists()]
        if not held:
            self.find("DS521", f"has no {files[0]}", "save the adapter again")
            self.settle()
        self.file = held[0]
        for key, value in self.tensors(self.file).items():
            plain = self.plain(key)
            if plain in self.weights:
                self.find("DS543", f"has {plain} twice, under two names", "save the adapter again", self.file)
            self.weights[plain] = value
            self.incoming.origin[id(value)] = self.file, key
            self.incoming.held.append(value)
            self.incoming.account[plain] = ""

    def plain(self, key: str) -> str:
        """Return a key without what torch wraps around modules, unless the model has a module that is called so."""
        return key if key.startswith("module.") and "module" in self.base.rows else without_wrappers(key)

    def called(self, module: str) -> str:
        """Return what the base model, as it is today, calls a module of the file, but for what stands in front."""
        return module if module in self.base.rows else of_today(module, self.base.table.model_type)

    def take(self, key: str, became: str, shape: tuple[int | None, ...] | None = None) -> Tensor | None:
        """Take a tensor, saying what became of it; None where there is none, or none of this shape (None: any size).

        One that has a shape to have is of floating point, of a dtype that torch computes in.
        """
        found = self.weights.pop(key, None)
        if found is None:
            return None
        self.incoming.account[key] = became
        if shape is not None and not _fits(tuple(found.shape), shape):
            wanted = "×".join("?" if size is None else str(size) for size in shape)
            message = f"{key} has the shape {list(found.shape)}, where {wanted} is due"
            self.find("DS526", message, "the file and the configuration are of two adapters", self.file)
            return None
        if shape is not None and str(found.dtype).removeprefix("torch.") not in _COMPUTED:
            message = f"{key} has the type {found.dtype}, where one of {', '.join(_COMPUTED)} is due"
            self.find("DS526", message, "save the adapter again from the model that it was trained in", self.file)
            return None
        return found

    def widen(self) -> None:
        """Give tensors of several dtypes the widest of them: what is computed from some is computed in one."""
        import torch

        kinds = {value.dtype for value in self.weights.values()}
        kinds = {kind for kind in kinds if str(kind).removeprefix("torch.") in _COMPUTED}
        if len(kinds) > 1:
            wide = reduce(torch.promote_types, kinds)
            self.weights = {key: v.to(wide) if v.dtype in kinds else v for key, v in self.weights.items()}
            self.remark(f"its tensors are of several types: all came in as {str(wide).removeprefix('torch.')}")

    def need(self, key: str, became: str, shape: tuple[int | None, ...] | None = None) -> Tensor | None:
        """Take a tensor; that there is none is a finding."""
        if key not in self.weights:
            self.find("DS543", f"has no {key}", "the file was cut: save the adapter again", self.file)
            return None
        return self.take(key, became, shape)

    def places(self, modules: Iterable[str], among: Collection[str] | None = None) -> dict[str, str]:
        """Return the FQNs here of modules as the file calls them; what has none is a finding.

        They may lie under another prefix: adapters of a model with a head fit the model without it, and the reverse.
        `among` are the names that they may have here, if not those of modules.
        """
        rows = self.base.rows
        here = rows if among is None else among
        named = {module: self.called(module) for module in modules}
        fits = self._agreed(prefixes(named.values(), here), named.values())
        found = {m: fits[0].to_here(n) or "" if fits else n for m, n in named.items() if fits or n in here}
        if lost := [module for module in named if module not in found]:
            kind = self.base.table.model_class
            message = f"is for another model: {shown(lost)} {'is' if len(lost) == 1 else 'are'} not in this {kind}"
            hint = f"load its base model, {self.incoming.base}" if self.incoming.base else "load its base model"
            self.find("DS523", message, hint, self.file)
        return found if among is not None else {module: rows[name].fqn for module, name in found.items()}

    def _agreed(self, fits: list[Prefix], names: Collection[str]) -> list[Prefix]:
        """Return the prefix of all that was placed before first; that several fit alike is a finding."""
        if self.prefix in fits:
            return [self.prefix]
        if not fits or not names:
            return fits
        alike = [one for one in fits if one.saved == fits[0].saved]  # the others keep less of each name
        if fits[0].changes and len({tuple(map(one.to_here, names)) for one in alike}) > 1:
            places = ", ".join(repr(one.here) for one in alike[:8])
            message = f"what it was trained on ({shown(names)}) is here several times: under {places}"
            self.find("DS537", message, f"read it onto one of them, such as model.{fits[0].here}", self.file)
        self.prefix = fits[0]
        return fits[:1]

    def owned(self, keys: Iterable[str]) -> dict[str, tuple[str, str]]:
        """Return, of keys that name parameters of the base as they are, each one's module here and own name."""
        owners = {key: key.rpartition(".")[0] for key in keys}
        named = {owner: self.called(owner) for owner in dict.fromkeys(owners.values())}
        rows, fits = self.base.rows, self._agreed(prefixes(named.values(), self.base.rows), named.values())
        if fits:
            named = {owner: fits[0].to_here(name) or "" for owner, name in named.items()}
        elif self.prefix.changes:  # some are outside of what is the same in both models
            named = {owner: self.prefix.to_here(name) or name for owner, name in named.items()}
        found: dict[str, tuple[str, str]] = {}
        for key, owner in owners.items():
            row, own = rows.get(named[owner]), key.rpartition(".")[2]
            if row is not None and row.has_parameter(own):
                found[key] = (row.fqn, own)
        return found

    def in_full(self, part: str, places: Mapping[str, tuple[str, str]]) -> None:
        """Add a delta that puts tensors in place of the base's own, but for those that are the base's own.

        `places` has each one's module and own name there, as `owned` gives them.
        """
        sites = []
        for key, (fqn, own) in places.items():
            row = self.base.rows[fqn]
            value = self.take(key, f"{below(fqn, own)}, in full", row.shape_of(own))
            if value is None:
                continue
            if self._same(below(fqn, own), value):
                self.incoming.account[key] = "the base's own values: not needed"
                continue
            sites.append(IncomingSite(fqn, {own: value}, parameter=own))
        by_place: dict[str, IncomingSite] = {}
        for site in sites:  # a tied parameter is saved under each of its names
            before, own = by_place.setdefault(self._shared(site), site), str(site.parameter)
            if not before.tensors[str(before.parameter)].equal(site.tensors[own]):
                message = f"holds {below(site.fqn, own)}, which is tied, with two values"
                self.find("DS539", message, "save it again from the model that it was trained in", self.file)
        some = any(p.tied for site in by_place.values() for p in self.base.rows[site.fqn].parameters)
        self.add("full", {"tied": "together"} if some else {}, by_place.values(), part)

    def _shared(self, site: IncomingSite) -> str:
        own = next(p for p in self.base.rows[site.fqn].parameters if p.name == site.parameter)
        return min((own.fqn, *own.tied))

    def leave_own(self, key: str, fqn: str) -> None:
        """Take a key that holds what the base has there anyway, as a model's whole state does."""
        if self._same(fqn, self.weights[key]):
            self.take(key, "the base's own values: not needed")

    def _same(self, fqn: str, value: Tensor) -> bool:
        import torch

        own = self.base.tensor(fqn)
        return not own.is_meta and torch.equal(own.cpu().to(value.dtype), value)

    def add(
        self, method: str, params: Mapping[str, Any], sites: Iterable[IncomingSite], part: str = "", **more: Any
    ) -> None:
        """Add a delta; `part` is put behind the adapter's name where it is not the only one."""
        found = tuple(sites)
        if any(site.fqn == "" for site in found):
            message = "changes parameters that the model itself owns, in none of its modules: no selector means those"
            self.find("DS549", message, "merge it with the library that wrote it", self.file)
        elif found:
            name = f"{self.name}-{part}" if part else self.name
            assert all(delta.name != name for delta in self.incoming.deltas), f"two deltas are called {name}"
            self.incoming.deltas.append(IncomingDelta(name, method, params, found, **more))

    def remark(self, text: str) -> None:
        """Say something that a reader must know, once."""
        if text not in self.incoming.remarks:
            self.incoming.remarks.append(text)

    def finish(self) -> Incoming:
        """Return what was read. Raises DeltaSpecError where a key was not taken, or nothing was found.

        What is left of an adapter that is refused anyhow says nothing.
        """
        if (left := list(self.weights)) and not self.findings:
            message = f"holds {shown(left)}, which {'fits' if len(left) == 1 else 'fit'} nowhere"
            self.find("DS543", message, "the file and the configuration are of two adapters, or one was cut", self.file)
        if not self.findings and not self.incoming.deltas:
            self.find("DS543", "holds no tensor of an adapter", "save the adapter again", self.file)
        self.settle()
        return self.incoming


def _fits(shape: tuple[int, ...], wanted: tuple[int | None, ...]) -> bool:
    return len(shape) == len(wanted) and all(w in (None, size) for size, w in zip(shape, wanted, strict=True))


def without_wrappers(key: str) -> str:
    """Return a key without what torch wraps around modules: DataParallel's `module` in front, others anywhere."""
    segments = [segment for segment in key.split(".") if segment not in _WRAPPERS]
    while segments and segments[0] == "module":
        segments = segments[1:]
    return ".".join(segments)
