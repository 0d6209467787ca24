"""The verb `methods`: the table of methods, printed, or kept up to date in a Markdown file."""

from __future__ import annotations

from pathlib import Path

import click

from deltaspec.cli._params import Verb
from deltaspec.cli._shared import report, say, writing
from deltaspec.diagnostics.findings import Diagnostic
from deltaspec.methods.registry import builtin_methods, methods


@click.command(cls=Verb)
@click.argument("path", required=False, type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--check", is_flag=True, help="Only compare the table in PATH; exit 1 where it differs.")
def command(path: Path | None, check: bool) -> None:
    """Print the table of methods, those of other installed packages included, or write deltaspec's own into PATH.

    PATH is a Markdown file with the marks that stand around the table.
    """
    from deltaspec.reports.methods_table import methods_table, with_table

    if path is None:
        if check:
            raise click.UsageError("--check needs PATH")
        click.echo(methods_table(methods()), nl=False)
        return
    try:
        text = path.read_text(encoding="utf-8")
        new = with_table(text, builtin_methods())
    except (OSError, ValueError) as error:
        raise click.UsageError(f"{path}: {error}") from None
    if check and new != text:
        hint = f"write it anew: deltaspec methods {path}"
        report([Diagnostic("DS222", "the table of methods is out of date", str(path), suggestion=hint)])
    if not check:
        with writing(path):
            path.write_text(new, encoding="utf-8", newline="\n")
    say(f"{path} is up to date")
