"""The verb `check`: what a serving engine would reject, ignore or get wrong of an adapter, before it is deployed."""

from __future__ import annotations

import click

from deltaspec.cli._params import ENGINE, Verb, output_format
from deltaspec.cli._shared import apart, report, say
from deltaspec.diagnostics.render import FORMATS
from deltaspec.engines import notes


@click.command(cls=Verb)
@click.argument("adapter")
@click.option(
    "--model", metavar="BASE", help="The base: a directory, a config.json, a hub id or package.module:factory."
)
@click.option("--for", "engine", type=ENGINE, help="The engine that is to serve it.")
@click.option("--max-rank", type=click.IntRange(min=1), help="Greatest rank that the engine is started with.")
@output_format(*FORMATS, what="Findings")
def command(adapter: str, model: str | None, engine: str | None, max_rank: int | None, output_format: str) -> None:
    """Say what an engine would reject, ignore or get wrong of ADAPTER, a directory of saved deltas or of PEFT.

    No weights of the base are needed, and of the adapter's tensors names and shapes alone are read. Exit codes: 0 it is
    served as it was trained, 1 findings, 2 usage.
    """
    if engine is None or model is None:
        lacking = "--for" if engine is None else "--model"
        raise click.UsageError(f"check needs {lacking}: deltaspec check ADAPTER --model BASE --for ENGINE")
    from deltaspec.engines import check

    with apart():
        findings = check(adapter, model, engine, max_rank)
    if output_format == "text":
        for note in notes(engine):
            say(f"note: {note}", err=True)
        if not findings:
            say(f"{adapter}: nothing that {engine} would reject, ignore or get wrong")
            return
    report(findings, output_format)
