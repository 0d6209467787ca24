"""The verb `verify`: whether saved deltas still give the answers that were kept with them, here or elsewhere."""

from __future__ import annotations

import os
from math import isfinite
from typing import TYPE_CHECKING

import click

from deltaspec.cli._params import MATCH, OneOf, Verb, output_format
from deltaspec.cli._shared import apart, report, say, tell
from deltaspec.names.urls import is_url

if TYPE_CHECKING:
    from deltaspec.storage.agreement import Agreement

_DTYPES = ("float64", "float32", "float16", "bfloat16")


@click.command(cls=Verb)
@click.argument("directory")
@click.argument("names", nargs=-1, metavar="[DELTA]...")
@click.option("--model", help="The base model, with weights: a directory, a hub id, or package.module:factory.")
@click.option("--against", type=OneOf(lambda: ("peft", "onnx"), "URL", is_url),
              help="Who computes: the real PEFT, ONNX Runtime, or a server.")  # fmt: skip
@click.option("--dtype", type=OneOf(lambda: _DTYPES),
              help="dtype in which MODEL is loaded, or in which the server computes.")  # fmt: skip
@click.option("--tolerance", type=click.FloatRange(min=0), help="Largest difference, over the largest magnitude.")
@click.option("--match", type=MATCH, default="weights", show_default=True,
              help="How much of the base must be as it was when the deltas were saved.")  # fmt: skip
@click.option("--key-from", metavar="VARIABLE", help="Variable of the environment with the server's API key.")
@output_format()
def command(
    directory: str,
    names: tuple[str, ...],
    model: str | None,
    against: str | None,
    dtype: str | None,
    tolerance: float | None,
    match: str,
    key_from: str | None,
    output_format: str,
) -> None:
    """Compute what was kept of the deltas in DIRECTORY (c.save(dir, golden=inputs)) again, and compare.

    Without --against, deltaspec computes it on MODEL. A server is asked by OpenAI's completions API, each delta as the
    model of its name. Exit codes: 0 the same numbers, 1 others, or findings, 2 usage.
    """
    if model is None and (against is None or not is_url(against)):
        raise click.UsageError("--model is needed: the base model, with its weights")
    if key_from is not None and key_from not in os.environ:
        raise click.UsageError(f"there is no {key_from} in the environment")
    from deltaspec.storage.matching import checked
    from deltaspec.verification import verify

    key, level = None if key_from is None else os.environ[key_from], checked(match)
    with apart():
        found = verify(
            directory, model, *names, against=against, tolerance=tolerance, dtype=dtype, key=key, match=level
        )
    if output_format == "json":
        result = {"directory": directory, "model": model, "against": against, "agreements": [*map(_data, found)]}
        tell(result, found.findings)
        click.get_current_context().exit(0 if found else 1)
    say(str(found))
    if found.findings:
        report(found.findings)


def _data(each: Agreement) -> dict[str, object]:
    """Return a comparison as JSON takes it: what is not finite is null."""
    return {
        "deltas": dict(each.attached),
        "verdict": each.verdict,
        "max_abs": each.absolute if isfinite(each.absolute) else None,
        "max_rel": each.relative if isfinite(each.relative) else None,
        "argmax": each.argmax,
        "dtype": each.dtype,
        "tolerance": each.tolerance,
    }
