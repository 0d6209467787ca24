"""Writing deltas in the form of another library: the format is found by its name, and a refusal writes nothing."""

from __future__ import annotations

from functools import cache
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Protocol, cast

from deltaspec.diagnostics.findings import DeltaSpecError, Diagnostic
from deltaspec.diagnostics.wording import closest
from deltaspec.documents.atomic import Together, alone_in
from deltaspec.documents.occupied import refuse_occupied
from deltaspec.formats.outgoing import Outgoing
from deltaspec.names.packages import packages_in
from deltaspec.storage.delta_set import refuse_saved


class Writer(Protocol):
    """A form to write in: the module `export` of a package here."""

    MAIN: str
    """Name of the file that makes the others valid: it appears last."""

    def write(self, out: Outgoing) -> dict[str, bytes]:
        """Return all files, by name. Raises DeltaSpecError with all findings."""


@cache
def forms() -> tuple[str, ...]:
    """Return the names of the forms that can be written: the packages here that have a module `export`."""
    import deltaspec.formats as home

    return tuple(name for name in packages_in(home) if find_spec(f"{home.__name__}.{name}.export") is not None)


def writer(form: str) -> Writer:
    """Return the writer of a form. Raises DeltaSpecError (DS561) for one that is not known."""
    if form not in forms():
        near = closest(form, forms())
        hint = f"did you mean {near}?" if near else f"known forms: {', '.join(forms())}"
        raise DeltaSpecError([Diagnostic("DS561", f"{form!r} is no form that deltas are written in", suggestion=hint)])
    return cast("Writer", import_module(f"deltaspec.formats.{form}.export"))


def write_files(folder: Path, files: dict[str, bytes], main: str) -> None:
    """Write files to a directory, made if need be; `main` appears last. Raises DeltaSpecError, OSError."""
    refuse_saved(folder)
    refuse_occupied(folder, adapters=False)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except FileExistsError:
        finding = Diagnostic("DS521", "is a file", file=str(folder), suggestion="give a directory")
        raise DeltaSpecError([finding]) from None
    with alone_in(folder), Together(folder) as together:
        for name, content in files.items():
            if name != main:
                together.add(name, content)
        together.appear(main, files[main])
