"""Opening what a user names: saved deltas, or an adapter that another library wrote, here or on a hub."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import cache
from importlib import import_module
from os import PathLike
from pathlib import Path
from typing import NoReturn, Protocol, cast

from deltaspec.backbone.hub import quietly, refusal
from deltaspec.backbone.loading import Wanted
from deltaspec.diagnostics.findings import DeltaSpecError, Diagnostic
from deltaspec.diagnostics.wording import brief
from deltaspec.documents.nearby import did_you_mean
from deltaspec.formats.alike import AlikeSet, recipe_of
from deltaspec.formats.base import Base
from deltaspec.formats.incoming import Incoming
from deltaspec.formats.received import ReceivedSet
from deltaspec.formats.saved_base import base_saved_with
from deltaspec.formats.unread import Unread
from deltaspec.names.packages import packages_in
from deltaspec.storage.delta_set import MANIFEST, DeltaSet
from deltaspec.storage.saved import SavedSet

_HUB_ID = re.compile(r"(?P<repo>\w[\w.-]*/[\w.-]+)(?P<folder>(/[\w.-]+)*)(@(?P<revision>[\w./-]+))?", re.ASCII)
WAYS = "name the directory that c.save(dir) wrote, or the one with an adapter's adapter_config.json"
CONFIG = "adapter_config.json"
"""The configuration of an adapter of PEFT or AdapterHub."""
_NAME = re.compile(r"[^A-Za-z0-9_.-]+")


class Format(Protocol):
    """A format: the module `reader` of a package here."""

    FILES: tuple[str, ...]
    """Globs of the files that a directory of this format consists of, for fetching it from a hub."""

    def recognises(self, folder: Path) -> bool:
        """Return whether a directory is of this format, by its files alone."""

    def base_of(self, folder: Path) -> tuple[str | None, Wanted]:
        """Return the base model that a directory names, and of which kind it is to be. Raises DeltaSpecError."""

    def signature(self, folder: Path) -> bytes | None:
        """Return all of a directory but the values of its tensors; None where it is not worth it, or cannot be read."""

    def read(self, folder: Path, base: Base, name: str) -> Incoming:
        """Read a directory for a base model; `name` is what its delta is to be called. Raises DeltaSpecError."""


@cache
def formats() -> tuple[Format, ...]:
    """Return all formats: the packages here that have a module `reader`."""
    import deltaspec.formats as home

    readers = (f"{home.__name__}.{name}.reader" for name in packages_in(home))
    return tuple(cast("Format", import_module(reader)) for reader in readers)


def format_of(folder: Path) -> Format | None:
    """Return the format of a directory; None where it is none of these."""
    return next((known for known in formats() if known.recognises(folder)), None)


def base_reference(folder: Path, model: str | None) -> tuple[str, Wanted]:
    """Return the base model of a directory, as the command line calls it: `model`, or the one that its files name.

    What a file names is never run: it is a directory, a configuration or a hub id. Raises DeltaSpecError (DS563) where
    there is no name.
    """
    known = format_of(folder) if folder.is_dir() else None
    named, wanted = (None, Wanted()) if known is None else known.base_of(folder)
    if known is None and (folder / MANIFEST).is_file():
        named, wanted = base_saved_with(folder)
    if model is not None:
        return model, wanted
    if named is None:
        hint = "name the base model: --model DIRECTORY (or a hub id, or package.module:factory)"
        raise DeltaSpecError([Diagnostic("DS563", "names no base model", str(folder), suggestion=hint)])
    return named, replace(wanted, factories=False)


def refuse_no_adapter(folder: Path) -> None:
    """Raise DeltaSpecError where a directory is none, or holds no adapter: with what is near (DS521, DS522, DS540)."""

    def refuse(code: str, message: str, hint: str) -> NoReturn:
        raise DeltaSpecError([Diagnostic(code, message, str(folder), suggestion=hint)])

    if folder.is_file() and (format_of(folder.parent) is not None or (folder.parent / MANIFEST).is_file()):
        refuse("DS521", "is a file of an adapter", f"name {folder.parent}")
    if folder.exists() and not folder.is_dir():
        refuse("DS521", "is a file, not a directory", WAYS)
    if not folder.is_dir():
        hint = did_you_mean(folder, "check the path, or give a hub id (org/name)")
        refuse("DS521", "there is no such directory", hint)
    if (folder / CONFIG).is_file():
        Unread(folder).json(CONFIG)  # which says where it is malformed
    elif inside := adapters_in(folder):
        named = ", ".join(path.name for path in inside[:8]) + " …" * (len(inside) > 8)
        hint = f"name one of them, such as {folder / inside[0].name}; c.library(dir, by='folder') takes them all"
        if len(inside) == 1:
            refuse("DS540", f"holds no adapter itself, but one in {named}", f"name {folder / named}")
        refuse("DS540", f"holds several adapters: {named}", hint)


def no_adapter(folder: Path) -> DeltaSpecError:
    """Return the error (DS521) about a directory in which there is nothing that can be read."""
    message, hint = "holds neither saved deltas nor an adapter of PEFT, AdapterHub or OpenDelta", WAYS
    if (folder / CONFIG).is_file():
        message += f": its {CONFIG} names no type"
        hint = 'write the type into it, as PEFT does ("peft_type": "LORA"), or save the adapter again'
    return DeltaSpecError([Diagnostic("DS521", message, str(folder), suggestion=hint)])


def open_set(directory: str | PathLike[str], base: Callable[[], Base], name: str | None = None) -> DeltaSet:
    """Open saved deltas or a foreign adapter, by path or hub id; `name` is what the latter's delta is to be called.

    A hub id may have a folder in the repository and a revision: `user/adapters/french@main`. Raises DeltaSpecError.
    """
    folder = located(directory)
    if not (folder / MANIFEST).exists():
        if (known := format_of(folder)) is not None:
            return _received(known, folder, base(), name or delta_name(folder))
        refuse_no_adapter(folder)
        raise no_adapter(folder)
    return SavedSet(folder)


def _received(known: Format, folder: Path, base: Base, name: str) -> DeltaSet:
    """Read a foreign adapter, and note which files that was: those that are written again are others."""
    stamp = _stamp(folder, known.FILES)
    received = _read(known, folder, base, name)
    for entry in received.entries:
        entry["stamp"] = stamp
    return received


def _stamp(folder: Path, patterns: Iterable[str]) -> list[tuple[str, int, int, int]]:
    """Return what tells files from those that took their place, without reading them."""
    found = sorted({path for pattern in patterns for path in folder.glob(pattern)})
    stats = [(path.name, path.stat()) for path in found if path.is_file()]
    return [(name, about.st_ino, about.st_size, about.st_mtime_ns) for name, about in stats]


def _read(known: Format, folder: Path, base: Base, name: str) -> DeltaSet:
    """Read a foreign adapter; those that differ from one before in their values alone are read as that was."""
    signature = known.signature(folder)
    recipe = base.recipes.get(signature)
    if signature is not None and recipe is not None:
        return AlikeSet(folder, name, recipe)
    received = ReceivedSet(known.read(folder, base, name), base)
    if signature is not None and (made := recipe_of(received, name)) is not None:
        base.recipes[signature] = made
    return received


def adapters_in(folder: Path) -> list[Path]:
    """Return the directories in a directory that hold saved deltas or an adapter, in order."""
    inside = sorted(path for path in folder.iterdir() if path.is_dir())
    return [path for path in inside if (path / MANIFEST).exists() or format_of(path) is not None]


def delta_name(folder: Path) -> str:
    """Return what the delta of a foreign directory is called: as its directory, so far as a name may be so."""
    return _NAME.sub("-", os.path.basename(os.path.abspath(folder))).strip("-_.")[:60] or "adapter"


def located(directory: str | PathLike[str]) -> Path:
    """Return the directory that is named; one on a hub is fetched, where there is none here by this name."""
    path = Path(os.path.expanduser(directory))
    found = _HUB_ID.fullmatch(os.fspath(directory))
    if path.exists() or found is None:
        return path
    return _fetched(found["repo"], found["folder"].strip("/"), found["revision"])


def _fetched(repo: str, folder: str, revision: str | None) -> Path:
    """Fetch an adapter from a hub into the hub's cache."""
    try:
        from huggingface_hub import snapshot_download
    except ModuleNotFoundError:
        hint = "pip install 'deltaspec[transformers]', or name a directory"
        finding = Diagnostic("DS521", "there is no such directory here, and no client of a hub", repo, suggestion=hint)
        raise DeltaSpecError([finding]) from None
    inside, place = f"{folder}/" if folder else "", f"{repo}/{folder}" if folder else repo
    wanted = [f"{inside}{pattern}" for pattern in _patterns()]
    try:
        with quietly():
            root = Path(snapshot_download(repo, revision=revision, allow_patterns=wanted))
    except Exception as error:  # whatever the hub's client raises
        said, hint = refusal(error, repo, revision) or (
            f"the hub's client failed: {brief(error)}",
            "check the id (org/name, org/name/folder, org/name@revision)",
        )
        message = f"there is no such directory here, and {said}"
        finding = Diagnostic("DS521", message, place, suggestion=did_you_mean(place, f"{hint}; or name a directory"))
        raise DeltaSpecError([finding]) from error
    found = root / folder if folder else root
    if not found.is_dir() or not any(found.iterdir()):
        what = f"the folder {folder!r} of this repository" if folder else "this repository"
        hint = "look at its files on the hub: an adapter may lie in a folder (org/name/folder), or in another revision"
        finding = Diagnostic("DS521", f"there is no adapter in {what} on the hub", place, suggestion=hint)
        raise DeltaSpecError([finding])
    return found


def _patterns() -> Iterable[str]:
    ours = (MANIFEST, "*.deltaspec.json", "*.deltaspec.lock.json", "*.safetensors")
    return dict.fromkeys((*ours, *(pattern for known in formats() for pattern in known.FILES)))
