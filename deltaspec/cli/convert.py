"""The verb `convert`: an adapter that another library wrote becomes a spec and saved deltas."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from deltaspec.cli._params import Verb, output_format
from deltaspec.cli._shared import counts, say, tell, writing
from deltaspec.diagnostics.clean import clean
from deltaspec.diagnostics.wording import counted

if TYPE_CHECKING:
    from deltaspec.formats.convert import Conversion


@click.command(cls=Verb)
@click.argument("source")
@click.option("-o", "--output", required=True, metavar="DIR", help="Directory for the spec, its lock and the deltas.")
@click.option("--model", metavar="MODEL", help="The base model; left out, the one that the adapter names.")
@click.option("--name", help="Name of the delta; left out, that of the directory.")
@output_format(what="The account and findings")
def command(source: str, output: str, model: str | None, name: str | None, output_format: str) -> None:
    """Convert SOURCE, an adapter of PEFT, AdapterHub or OpenDelta, into a spec with a lock, and saved deltas.

    SOURCE is a directory or a hub id (org/name, org/name/folder, org/name@revision). MODEL is a directory or
    config.json of Hugging Face, a hub id, or package.module:factory; its weights are read only where a delta keeps
    something that follows from them. Every key and every option of the adapter is accounted for, or nothing is written.
    Exit codes: 0 converted, 1 findings, 2 usage.
    """
    from deltaspec.formats.convert import convert

    with writing(output):
        done = convert(source, output, model, name)
    if output_format == "json":
        tell(_data(done))
        return
    say(f"{clean(str(done.spec))}: {done.received.incoming.kind}")
    for delta in done.plan.deltas:
        say(f"  {delta.name}: {delta.method}, {counted(len(delta.sites), 'site')}, {delta.trainable:,} parameters")
    say(f"  {counted(len(done.account), 'tensor')} of the adapter, all accounted for")
    for remark in done.received.incoming.remarks:
        say(f"  note: {remark}")


def _data(done: Conversion) -> dict[str, object]:
    incoming = done.received.incoming
    return {
        "spec": str(done.spec),
        "from": incoming.kind,
        "base": incoming.base,
        "revision": incoming.revision,
        "deltas": counts(done.plan),
        "account": done.account,
        "remarks": incoming.remarks,
    }
