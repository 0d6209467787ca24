"""The verb `validate`: check specs without a model, and without torch."""

from __future__ import annotations

import glob
import os
import sys
from collections.abc import Iterator

import click

from deltaspec.cli._params import Verb, output_format
from deltaspec.cli._shared import report
from deltaspec.diagnostics.findings import Diagnostic
from deltaspec.diagnostics.render import FORMATS
from deltaspec.documents.document import MAX_BYTES
from deltaspec.language.checks.tools import CONFIGURATIONS, of_adapters
from deltaspec.language.validate import validate, validate_content

_INPUT = "<stdin>"
ENDINGS = (".deltaspec.yaml", ".deltaspec.yml", ".deltaspec.json")


@click.command(cls=Verb)
@click.argument("paths", nargs=-1, required=True)
@output_format(*FORMATS, what="Findings")
def command(paths: tuple[str, ...], output_format: str) -> None:
    """Check specs: files, globs, directories searched for *.deltaspec.yaml, .yml and .json, or - for standard input.

    A directory that has no spec but an adapter of another library is a finding, with the command that reads it.
    Needs no model and no torch. Exit codes: 0 valid, 1 findings, 2 nothing to check.
    """
    skipped: list[str] = []
    files = list(dict.fromkeys(file for path in paths for file in expand(path, skipped)))
    findings = [finding for file in files for finding in (_from_input() if file == "-" else validate(file))]
    report(findings, output_format, len(files), list(dict.fromkeys(skipped)))


def _from_input() -> list[Diagnostic]:
    """Return the findings about what stands on standard input."""
    if sys.stdin is None or sys.stdin.closed:
        return [Diagnostic("DS101", "cannot read: standard input is closed", _INPUT)]
    return validate_content(sys.stdin.buffer.read(MAX_BYTES + 1), _INPUT)


def expand(path: str, skipped: list[str]) -> list[str]:
    """Return the files that a path on the command line means, and add what was not looked into to `skipped`.

    A directory means its specs; one that has none means the configurations of other libraries' adapters in it.

    Raises click.UsageError where it means none.
    """
    if os.path.isdir(path):
        passed: list[str] = []
        found = sorted(_files_below(path, passed, ENDINGS))
        if not found:  # an adapter's directory is told as what it is
            found = sorted(of_adapters(_files_below(path, [], CONFIGURATIONS)))
        if not found:
            passed = [f"{path}: no file here ends in {', '.join(ENDINGS)}", *passed]
            raise click.UsageError("; ".join(passed))
        skipped += passed
        return found
    if path == "-" or os.path.lexists(path) or not glob.has_magic(path):
        return [path]
    found = sorted(file for file in glob.glob(path, recursive=True) if not os.path.isdir(file))
    if not found:
        raise click.UsageError(f"{path}: no file matches")
    return found


def _files_below(directory: str, skipped: list[str], endings: tuple[str, ...]) -> Iterator[str]:
    hidden: list[str] = []
    linked: list[str] = []
    failed: list[OSError] = []
    for folder, folders, files in os.walk(directory, onerror=failed.append):
        inside = {name: os.path.normpath(os.path.join(folder, name)) for name in sorted(folders)}
        hidden += (path for name, path in inside.items() if name.startswith("."))
        linked += (path for name, path in inside.items() if not name.startswith(".") and os.path.islink(path))
        folders[:] = [name for name in inside if not name.startswith(".")]
        yield from (os.path.normpath(os.path.join(folder, file)) for file in files if file.endswith(endings))
    for reason, paths in (("hidden", hidden), ("linked", linked)):
        if paths:
            skipped.append(f"skipped, since {reason}: {', '.join(paths)}")
    skipped += (f"skipped, since unreadable ({error.strerror}): {error.filename}" for error in failed)
