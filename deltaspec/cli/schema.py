"""The verb `schema`: print, write or check the JSON Schema of a spec."""

from __future__ import annotations

from difflib import unified_diff
from pathlib import Path

import click

from deltaspec.cli._params import Verb
from deltaspec.cli._shared import report, say, writing
from deltaspec.diagnostics.findings import Diagnostic
from deltaspec.language.schema.accept import COMMITTED
from deltaspec.language.schema.generate import schema_text


@click.command(cls=Verb)
@click.argument("path", required=False, type=click.Path(dir_okay=False, path_type=Path))
@click.option("--check", is_flag=True, help=f"Compare with the file (default: {COMMITTED}); exit 1 where it differs.")
@click.option("--with-plugins", is_flag=True, help="Include the methods of other installed packages.")
def command(path: Path | None, check: bool, with_plugins: bool) -> None:
    """Print the JSON Schema of a spec, or write it to PATH.

    The committed file knows deltaspec's own methods. For an editor that should know those of other packages too, write
    one with --with-plugins.
    """
    text = schema_text(with_plugins)
    if check:
        _check(path or Path(COMMITTED), text)
    elif path is not None:
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8", newline="\n")
    else:
        click.echo(text, nl=False)


def _check(path: Path, text: str) -> None:
    hint = f"write it anew: deltaspec schema {path}"
    try:
        found = path.read_bytes().decode("utf-8")
    except FileNotFoundError:
        report([Diagnostic("DS221", "there is no schema file here", str(path), suggestion=hint)])
        return
    except (OSError, UnicodeDecodeError) as error:
        raise click.UsageError(f"{path}: cannot read: {error}") from None
    if found != text:
        lines = unified_diff(found.splitlines(True), text.splitlines(True), str(path), "generated")
        say("".join(lines), nl=False)
        report([Diagnostic("DS221", "the schema file is out of date", str(path), suggestion=hint)])
    say(f"{path} is up to date")
