"""The verb `extract`: a full fine-tune minus its base, as saved deltas."""

from __future__ import annotations

from pathlib import Path

import click

from deltaspec.cli._shared import say, writing
from deltaspec.diagnostics.wording import counted

_FOLDER = click.Path(exists=True, file_okay=False, path_type=Path)


@click.command()
@click.argument("full", type=_FOLDER)
@click.argument("base", type=_FOLDER)
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path), help="Directory of the deltas.")
@click.option("--rank", type=click.IntRange(min=1), help="Rank of each low-rank change.")
@click.option("--error", type=click.FloatRange(0, 1, max_open=True),
              help="Relative error of each change at most; the rank follows. Default: 0.01.")  # fmt: skip
@click.option("--name", default="extracted", show_default=True, help="Name of the delta; several begin with it.")
def command(full: Path, base: Path, output: Path, rank: int | None, error: float | None, name: str) -> None:
    """Write what the fine-tune in the folder FULL changed of the one in BASE as deltas, which `restore` takes.

    Matrices become lora, few rows of an embedding trainable_tokens, all else full. Each change is printed with its
    error. Exit codes: 0 written, 1 findings (nothing is written), 2 usage.
    """
    if rank is not None and error is not None:
        raise click.UsageError("--rank and --error both say the rank: give one of them")
    from deltaspec.folders import extract
    from deltaspec.folders.extraction import ERROR

    with writing(output):
        found = extract(full, base, output, rank=rank, error=ERROR if error is None else error, name=name)
    say(str(found))
    worst = max(change.error for change in found.changes)
    deltas, changes = counted(len(found.plan.deltas), "delta"), counted(len(found.changes), "change")
    say(f"{output}: {deltas}, {changes}, {found.plan.trainable:,} parameters; largest error {worst:.2g}")
