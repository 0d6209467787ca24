"""The verb `extract`: a full fine-tune minus its base, as saved deltas."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from deltaspec.cli._params import Verb, output_format
from deltaspec.cli._shared import counts, say, tell, writing
from deltaspec.diagnostics.wording import counted

if TYPE_CHECKING:
    from deltaspec.folders.differences import Change


@click.command(cls=Verb)
@click.argument("full")
@click.argument("base")
@click.option("-o", "--output", required=True, metavar="DIR", help="Directory of the deltas.")
@click.option("--rank", type=click.IntRange(min=1), help="Rank of each low-rank change.")
@click.option("--error", type=click.FloatRange(0, 1, max_open=True),
              help="Relative error of each change at most; the rank follows. Default: 0.01.")  # fmt: skip
@click.option("--name", default="extracted", show_default=True, help="Name of the delta; several begin with it.")
@output_format()
def command(
    full: str, base: str, output: str, rank: int | None, error: float | None, name: str, output_format: str
) -> None:
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
    worst = max(change.error for change in found.changes)
    if output_format == "json":
        changes = [*map(_data, found.changes)]
        more = {"changes": changes, "largest_error": worst, "rounded": list(found.rounded)}
        tell({"output": output, "deltas": counts(found.plan), **more})
        return
    say(str(found))
    deltas, changes_of = counted(len(found.plan.deltas), "delta"), counted(len(found.changes), "change")
    say(f"{output}: {deltas}, {changes_of}, {found.plan.trainable:,} parameters; largest error {worst:.2g}")


def _data(change: Change) -> dict[str, object]:
    rank = None if change.factors is None else change.factors.rank
    return {"at": change.fqn, "method": change.method, "rank": rank, "rows": len(change.rows), "error": change.error}
