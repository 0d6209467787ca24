"""The verb `validate`: check specs without a model, and without torch."""

from __future__ import annotations

import glob
import os
from collections.abc import Iterator

import click

from deltaspec.cli._shared import report
from deltaspec.diagnostics.render import FORMATS
from deltaspec.language.validate import validate

ENDINGS = (".deltaspec.yaml", ".deltaspec.yml", ".deltaspec.json")


@click.command()
@click.argument("paths", nargs=-1, required=True)
@click.option("--format", "output_format", type=click.Choice(list(FORMATS)), default="text", show_default=True,
              help="How findings are written.")  # fmt: skip
def command(paths: tuple[str, ...], output_format: str) -> None:
    """Check specs: files, globs, or directories searched for *.deltaspec.yaml, .yml and .json.

    Needs no model and no torch. Exit codes: 0 valid, 1 findings, 2 nothing to check.
    """
    files = list(dict.fromkeys(file for path in paths for file in expand(path)))
    findings = [finding for file in files for finding in validate(file)]
    report(findings, output_format, len(files))


def expand(path: str) -> list[str]:
    """Return the files that a path on the command line means. Raises click.UsageError where it means none."""
    if os.path.isdir(path):
        found = sorted(_specs_below(path))
        if not found:
            raise click.UsageError(f"{path}: no file here ends in {', '.join(ENDINGS)}")
        return found
    if os.path.lexists(path) or not glob.has_magic(path):
        return [path]
    found = sorted(file for file in glob.glob(path, recursive=True) if not os.path.isdir(file))
    if not found:
        raise click.UsageError(f"{path}: no file matches")
    return found


def _specs_below(directory: str) -> Iterator[str]:
    for folder, folders, files in os.walk(directory):
        folders[:] = [name for name in folders if not name.startswith(".")]
        yield from (os.path.normpath(os.path.join(folder, file)) for file in files if file.endswith(ENDINGS))
