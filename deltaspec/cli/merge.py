"""The verb `merge`: saved deltas folded into a folder of safetensors, shard by shard."""

from __future__ import annotations

import click

from deltaspec.cli._params import MATCH, Verb, output_format
from deltaspec.cli._shared import say, tell, writing
from deltaspec.diagnostics.wording import counted


@click.command(cls=Verb)
@click.argument("directory")
@click.argument("names", nargs=-1, metavar="[DELTA]...")
@click.option("--model", "base", required=True, metavar="BASE",
              help="Folder of the base model: config.json and safetensors.")  # fmt: skip
@click.option("-o", "--output", required=True, metavar="DIR", help="Folder to make.")
@click.option("--match", type=MATCH, default="weights", show_default=True,
              help="How much of the base must be as it was when the deltas were saved.")  # fmt: skip
@output_format()
def command(directory: str, names: tuple[str, ...], base: str, output: str, match: str, output_format: str) -> None:
    """Fold the deltas saved in DIRECTORY, by name or those that were attached, into a copy of the base model's folder.

    One shard is in memory at a time. Exit codes: 0 written, 1 findings (nothing is written), 2 usage.
    """
    from deltaspec.folders import merge_folder
    from deltaspec.storage.matching import checked

    with writing(output):
        changed = merge_folder(directory, base, output, *names, match=checked(match))
    if output_format == "json":
        tell({"output": output, "changed": list(changed)})
        return
    say(f"{output}: {counted(len(changed), 'tensor')} changed")
