"""The verb `lock`: write the plan of each spec down beside it."""

from __future__ import annotations

import click

from deltaspec.cli._params import Verb
from deltaspec.cli._shared import say
from deltaspec.cli.plan import plan_from
from deltaspec.diagnostics.wording import counted


@click.command(cls=Verb)
@click.argument("model")
@click.argument("specs", nargs=-1, required=True, metavar="SPEC...")
def command(model: str, specs: tuple[str, ...]) -> None:
    """Plan specs on MODEL and write each plan to a lock file: french.deltaspec.lock.json for french.deltaspec.yaml.

    Commit the locks: a review then sees what a change of a spec does, and `plan --check` fails where model and spec
    have drifted from it. Exit codes: 0 written, 1 findings (nothing is written), 2 usage.
    """
    from deltaspec.planning.lock import lock_path, write_lock

    planned = plan_from(model, specs)
    paths = [lock_path(spec) for spec in specs]
    if len(set(paths)) < len(paths):
        raise click.UsageError("two of these specs have the same lock file: give them different names")
    for part, path in zip(planned.parts(), paths, strict=True):
        try:
            write_lock(part, path)
        except OSError as error:
            raise click.UsageError(f"{path} cannot be written: {error.strerror}") from None
        say(f"{path}: {counted(len(part.sites), 'site')}, {part.trainable:,} trainable parameters")
