"""The verb `merge`: saved deltas folded into a folder of safetensors, shard by shard."""

from __future__ import annotations

from pathlib import Path

import click

from deltaspec.cli._shared import say, writing
from deltaspec.diagnostics.wording import counted


@click.command()
@click.argument("directory")
@click.argument("names", nargs=-1, metavar="[DELTA]...")
@click.option("--model", "base", required=True, type=click.Path(exists=True, file_okay=False, path_type=Path),
              help="Folder of the base model: config.json and safetensors.")  # fmt: skip
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path), help="Folder to make.")
@click.option("--match", type=click.Choice(["weights", "structure", "sites"]), default="weights", show_default=True,
              help="How much of the base must be as it was when the deltas were saved.")  # fmt: skip
def command(directory: str, names: tuple[str, ...], base: Path, output: Path, match: str) -> None:
    """Fold the deltas saved in DIRECTORY, by name or those that were attached, into a copy of the base model's folder.

    One shard is in memory at a time. Exit codes: 0 written, 1 findings (nothing is written), 2 usage.
    """
    from deltaspec.folders import merge_folder
    from deltaspec.storage.matching import checked

    with writing(output):
        changed = merge_folder(directory, base, output, *names, match=checked(match))
    say(f"{output}: {counted(len(changed), 'tensor')} changed")
