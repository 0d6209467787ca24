"""The verb `export`: saved deltas, or a foreign adapter, in the form of another library."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from contextlib import redirect_stdout
from typing import Any

import click

from deltaspec.cli._shared import report, say, writing
from deltaspec.diagnostics.clean import clean
from deltaspec.diagnostics.findings import DeltaSpecError


@click.command()
@click.argument("source")
@click.option("--to", "form", default="peft", show_default=True, help="Form to write.")
@click.option("-o", "--output", required=True, metavar="DIR", help="Directory for the adapter, made if need be.")
@click.option("--model", metavar="MODEL", help="The base model; left out, the one that a foreign adapter names.")
@click.option("--delta", "names", multiple=True, metavar="NAME", help="Delta to write; left out, those attached.")
@click.option("--uniform", is_flag=True, help="One rank and one scale for all modules.")
@click.option(
    "--for",
    "engine",
    metavar="ENGINE",
    help="Write it so that this engine's check passes, at a start that takes its rank.",
)
@click.option("--approximate", type=click.IntRange(min=1), metavar="RANK",
              help="Rank of the updates that stand for what has no exact form; their errors are printed.")  # fmt: skip
def command(
    source: str,
    form: str,
    output: str,
    model: str | None,
    names: tuple[str, ...],
    uniform: bool,
    engine: str | None,
    approximate: int | None,
) -> None:
    """Write SOURCE as one adapter that computes the same in another library.

    SOURCE is a directory of saved deltas, or an adapter of PEFT, AdapterHub or OpenDelta: a directory or a hub id.
    MODEL is a directory or config.json of Hugging Face, a hub id, or package.module:factory; its weights are read only
    where what is written follows from them. Deltas act together, at the strengths that they were saved with. What has
    no exact form is refused, and nothing is written. With --for, so is what the engine would reject, ignore or get
    wrong. Exit codes: 0 written, 1 findings, 2 usage.
    """
    from deltaspec.compiler.export import export
    from deltaspec.formats.outgoing import Wishes

    wishes = Wishes(uniform=uniform, approximate=approximate)
    try:
        with writing(output), redirect_stdout(sys.stderr):  # what a factory or a forward prints is no part of a report
            out = export(source, output, form, model, names, wishes, engine)
    except DeltaSpecError as error:
        report(error.diagnostics)
        return
    say(f"{clean(output)}: {out.label}, {', '.join(out.strengths)}")
    for fqn, error_here in out.errors.items():
        say(f"  {fqn}: relative error {error_here:.2e}")
    for remark in (*out.remarks, *_of(engine, out.config)):
        say(f"  note: {remark}")


def _of(engine: str | None, config: Mapping[str, Any]) -> tuple[str, ...]:
    """Return what whoever starts an engine must know of this adapter: its greatest rank, and the engine's own notes."""
    if engine is None:
        return ()
    from deltaspec.compiler.engine import greatest_rank
    from deltaspec.engines import notes

    rank = greatest_rank(config)
    said = (f"its greatest rank is {rank}: start {engine} so that it takes that (check: --max-rank {rank})",)
    return (*(said if rank else ()), *notes(engine))
