"""What several verbs share: printing, and the reporting of findings."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from typing import TYPE_CHECKING, Any

import click

from deltaspec.diagnostics.clean import clean, clean_data
from deltaspec.diagnostics.findings import Diagnostic
from deltaspec.diagnostics.render import FORMATS, as_text

if TYPE_CHECKING:
    from deltaspec.planning.plan import Plan


def say(text: str, *, err: bool = False, **style: Any) -> None:
    """Print a text that may hold names of files and modules; lines stay lines. `style` as for `click.secho`."""
    stream = sys.stderr if err else sys.stdout  # named: else click writes UTF-8 where the terminal has ASCII
    click.secho(clean(text, keep="\n"), stream, color=False if err else wants_color(), **style)


def show(
    diagnostics: Sequence[Diagnostic],
    output_format: str = "text",
    files: int | None = None,
    skipped: Sequence[str] = (),
) -> None:
    """Print findings in a format; `files` is the number of files looked at, `skipped` says what was not."""
    if output_format == "text":
        click.echo(as_text(diagnostics, files, skipped, color=wants_color()), sys.stdout)
    else:
        click.echo(FORMATS[output_format](diagnostics, files, skipped), sys.stdout)


def report(
    diagnostics: Sequence[Diagnostic],
    output_format: str = "text",
    files: int | None = None,
    skipped: Sequence[str] = (),
) -> None:
    """Print findings in a format, and end the command with exit code 1 where there are any."""
    show(diagnostics, output_format, files, skipped)
    if diagnostics:
        click.get_current_context().exit(1)


def tell(result: Mapping[str, Any], findings: Sequence[Diagnostic] = ()) -> None:
    """Print a result as one JSON object, which has `findings`, too."""
    found = json.loads(FORMATS["json"](findings, None, ()))["findings"]
    click.echo(json.dumps({**clean_data(dict(result)), "findings": found}, indent=2, allow_nan=False), sys.stdout)


def counts(plan: Plan) -> list[dict[str, Any]]:
    """Return what a plan's deltas are and cost, as JSON takes it."""
    return [
        {"name": delta.name, "method": delta.method, "sites": len(delta.sites), "parameters": delta.trainable}
        for delta in plan.deltas
    ]


@contextmanager
def apart() -> Iterator[None]:
    """Put on standard error what a factory, a forward or another library prints: it is no part of a result."""
    with redirect_stdout(sys.stderr):
        yield


@contextmanager
def writing(output: object) -> Iterator[None]:
    """As `apart`, and say that an output cannot be written, where the system refuses, as a usage error."""
    try:
        with apart():
            yield
    except OSError as error:
        place = error.filename or output
        raise click.UsageError(
            f"{clean(str(output))} cannot be written: {error.strerror or error} ({clean(str(place))})"
        ) from None


def wants_color() -> bool:
    """Return whether standard output is a terminal whose user has not said NO_COLOR."""
    return sys.stdout.isatty() and not os.environ.get("NO_COLOR")
