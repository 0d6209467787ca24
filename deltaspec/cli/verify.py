"""The verb `verify`: whether saved deltas still give the answers that were kept with them, here or elsewhere."""

from __future__ import annotations

import os
from pathlib import Path

import click

from deltaspec.cli._shared import report, say


@click.command()
@click.argument("directory", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.argument("names", nargs=-1, metavar="[DELTA]...")
@click.option("--model", help="The base model, with weights: a directory, a hub id, or package.module:factory.")
@click.option("--against", metavar="peft|onnx|URL", help="Who computes: the real PEFT, ONNX Runtime, or a server.")
@click.option("--dtype", type=click.Choice(["float64", "float32", "float16", "bfloat16"]),
              help="dtype in which MODEL is loaded, or in which the server computes.")  # fmt: skip
@click.option("--tolerance", type=click.FloatRange(min=0), help="Largest difference, over the largest magnitude.")
@click.option("--key-from", metavar="VARIABLE", help="Variable of the environment with the server's API key.")
def command(
    directory: Path,
    names: tuple[str, ...],
    model: str | None,
    against: str | None,
    dtype: str | None,
    tolerance: float | None,
    key_from: str | None,
) -> None:
    """Compute what was kept of the deltas in DIRECTORY (c.save(dir, golden=inputs)) again, and compare.

    Without --against, deltaspec computes it on MODEL. A server is asked by OpenAI's completions API, each delta as the
    model of its name. Exit codes: 0 the same numbers, 1 others, or findings, 2 usage.
    """
    url = against is not None and "://" in against
    if against not in (None, "peft", "onnx") and not url:
        raise click.UsageError(f"--against is peft, onnx or a URL, not {against!r}")
    if model is None and not url:
        raise click.UsageError("--model is needed: the base model, with its weights")
    if key_from is not None and key_from not in os.environ:
        raise click.UsageError(f"there is no {key_from} in the environment")
    from deltaspec.backbone.loading import Wanted, model_from
    from deltaspec.verification import verify

    wanted = Wanted(weights=True, dtype=None if url else dtype)
    base = None if model is None else model_from(model, wanted)
    key = None if key_from is None else os.environ[key_from]
    found = verify(directory, base, *names, against=against, tolerance=tolerance, dtype=dtype, key=key)
    say(str(found))
    if not found:
        report(found.findings)
