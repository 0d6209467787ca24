"""The verb `export`: saved deltas, or a foreign adapter, in the form of another library."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import click

from deltaspec.cli._params import ENGINE, MATCH, OneOf, Verb, output_format
from deltaspec.cli._shared import say, tell, writing
from deltaspec.diagnostics.clean import clean

if TYPE_CHECKING:
    from deltaspec.formats.outgoing import Outgoing


def _forms() -> Iterable[str]:
    from deltaspec.formats.saving import forms

    return forms()


@click.command(cls=Verb)
@click.argument("source")
@click.option("--to", "form", type=OneOf(_forms), default="peft", show_default=True, metavar="FORM",
              help="Form to write.")  # fmt: skip
@click.option("-o", "--output", required=True, metavar="DIR", help="Directory for the adapter, made if need be.")
@click.option("--model", metavar="MODEL", help="The base model; left out, the one that a foreign adapter names.")
@click.option("--delta", "names", multiple=True, metavar="NAME", help="Delta to write; left out, those attached.")
@click.option("--uniform", is_flag=True, help="One rank and one scale for all modules.")
@click.option(
    "--for",
    "engine",
    type=ENGINE,
    help="Write it so that this engine's check passes, at a start that takes its rank.",
)
@click.option("--approximate", type=click.IntRange(min=1), metavar="RANK",
              help="Rank of the updates that stand for what has no exact form; their errors are printed.")  # fmt: skip
@click.option("--match", type=MATCH, default="weights", show_default=True,
              help="How much of the base must be as it was when the deltas were saved.")  # fmt: skip
@output_format()
def command(
    source: str,
    form: str,
    output: str,
    model: str | None,
    names: tuple[str, ...],
    uniform: bool,
    engine: str | None,
    approximate: int | None,
    match: str,
    output_format: str,
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
    from deltaspec.storage.matching import checked

    wishes, level = Wishes(uniform=uniform, approximate=approximate), checked(match)
    with writing(output):
        out = export(source, output, form, model, names, wishes, engine, level)
    if output_format == "json":
        tell(_data(output, engine, out))
        return
    say(f"{clean(output)}: {out.label}, {', '.join(out.strengths)}")
    for fqn, error in out.errors.items():
        say(f"  {fqn}: relative error {error:.2e}")
    for remark in (*out.remarks, *_of(engine, out)):
        say(f"  note: {remark}")


def _data(output: str, engine: str | None, out: Outgoing) -> dict[str, object]:
    from deltaspec.compiler.engine import greatest_rank

    return {
        "output": output,
        "adapter": out.label,
        "deltas": out.strengths,
        "rank": greatest_rank(out.config),
        "errors": out.errors,
        "remarks": [*out.remarks, *_of(engine, out)],
    }


def _of(engine: str | None, out: Outgoing) -> tuple[str, ...]:
    """Return what whoever starts an engine must know of this adapter: its greatest rank, and the engine's own notes."""
    if engine is None:
        return ()
    from deltaspec.compiler.engine import greatest_rank
    from deltaspec.engines import notes

    rank = greatest_rank(out.config)
    said = (f"its greatest rank is {rank}: start {engine} so that it takes that (check: --max-rank {rank})",)
    return (*(said if rank else ()), *notes(engine))
