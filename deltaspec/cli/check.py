"""The verb `check`: what a serving engine would reject, ignore or get wrong of an adapter, before it is deployed."""

from __future__ import annotations

import sys
from contextlib import redirect_stdout

import click

from deltaspec.cli._shared import report, say
from deltaspec.diagnostics.render import FORMATS
from deltaspec.engines import known, notes


class _Engine(click.ParamType[str]):
    """A name among the files of rules, or a file of rules of one's own."""

    name = "engine"

    def get_metavar(self, param: click.Parameter, ctx: click.Context) -> str:
        return f"[{'|'.join(known())}|FILE.yaml]"

    def convert(self, value: str, param: click.Parameter | None, ctx: click.Context | None) -> str:
        if value in known() or value.endswith((".yaml", ".yml", ".json")):
            return value
        self.fail(f"{value!r} is not one of {', '.join(known())}, and no file of rules", param, ctx)


@click.command()
@click.argument("adapter")
@click.option(
    "--model", metavar="BASE", help="The base: a directory, a config.json, a hub id or package.module:factory."
)
@click.option("--for", "engine", type=_Engine(), help="The engine that is to serve it.")
@click.option("--max-rank", type=click.IntRange(min=1), help="Greatest rank that the engine is started with.")
@click.option("--format", "output_format", type=click.Choice(list(FORMATS)), default="text", show_default=True,
              help="How findings are written.")  # fmt: skip
def command(adapter: str, model: str | None, engine: str | None, max_rank: int | None, output_format: str) -> None:
    """Say what an engine would reject, ignore or get wrong of ADAPTER, a directory of saved deltas or of PEFT.

    No weights of the base are needed, and of the adapter's tensors names and shapes alone are read. Exit codes: 0 it is
    served as it was trained, 1 findings, 2 usage.
    """
    if engine is None or model is None:
        lacking = "--for" if engine is None else "--model"
        raise click.UsageError(f"check needs {lacking}: deltaspec check ADAPTER --model BASE --for ENGINE")
    from deltaspec.engines import check

    with redirect_stdout(sys.stderr):  # what a factory prints is no part of a report
        findings = check(adapter, model, engine, max_rank)
    if output_format == "text":
        for note in notes(engine):
            say(f"note: {note}", err=True)
        if not findings:
            say(f"{adapter}: nothing that {engine} would reject, ignore or get wrong")
            return
    report(findings, output_format)
