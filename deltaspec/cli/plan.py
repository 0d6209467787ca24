"""The verb `plan`: say what specs do to a model, or check that their locks still hold."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING

import click

from deltaspec.cli._params import Verb, output_format
from deltaspec.cli._shared import apart, report, say, show, wants_color
from deltaspec.diagnostics.clean import clean, clean_data
from deltaspec.diagnostics.findings import DeltaSpecError, Diagnostic
from deltaspec.diagnostics.render import FORMATS
from deltaspec.diagnostics.wording import counted, plural
from deltaspec.language.validate import validate

if TYPE_CHECKING:
    from deltaspec.planning.plan import Plan


@click.command(cls=Verb)
@click.argument("model")
@click.argument("specs", nargs=-1, required=True, metavar="SPEC...")
@click.option("--check", is_flag=True, help="Compare with the locks beside the specs instead of printing the plan.")
@output_format(*FORMATS, "markdown", what="The plan and findings")
def command(model: str, specs: tuple[str, ...], check: bool, output_format: str) -> None:
    """Return what specs do to MODEL: sites, tensors, counts, expectations.

    MODEL is a directory or config.json of Hugging Face, a hub id, or package.module:factory. No weights are needed.
    Exit codes: 0 planned (or, with --check, locked), 1 findings, 2 usage.
    """
    try:
        planned = plan_from(model, specs)
    except DeltaSpecError as error:
        _report(error.diagnostics, output_format)
        return
    if check:
        from deltaspec.planning.lock import check_lock, lock_path

        parts = list(zip(planned.parts(), map(lock_path, specs), strict=True))
        _report([finding for part, path in parts for finding in check_lock(part, path)], output_format)
        if output_format == "text":
            for part, path in parts:
                sites = counted(len(part.sites), "site")
                say(f"{clean(str(path))}: up to date, {sites}, {part.trainable:,} trainable parameters")
    elif output_format == "text":
        from rich.console import Console

        Console(soft_wrap=True, highlight=False, no_color=not wants_color() or None).print(planned)
    elif output_format == "json":
        click.echo(json.dumps(clean_data(planned.to_dict()), indent=2))
    elif output_format == "markdown":
        from deltaspec.planning.text import markdown

        click.echo(markdown(planned))
    else:
        show([], output_format)


def plan_from(model: str, specs: tuple[str, ...]) -> Plan:
    """Plan specs on a model, both as the command line names them. The specs are read first: that is quick."""
    if findings := [finding for spec in specs for finding in validate(spec)]:
        raise DeltaSpecError(findings)
    from deltaspec.backbone.loading import model_from
    from deltaspec.planning.resolve import plan

    with apart():
        return plan(model_from(model), *specs)


def _report(diagnostics: tuple[Diagnostic, ...] | list[Diagnostic], output_format: str) -> None:
    if output_format != "markdown":
        if diagnostics or output_format != "text":
            report(diagnostics, output_format)
        return
    if not diagnostics:
        click.echo("The lock is up to date.")
        return
    findings = "\n".join(map(str, diagnostics))
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", findings)), default=0))  # longer than any that it holds
    click.echo(f"### deltaspec: {len(diagnostics)} {plural(len(diagnostics), 'finding')}\n\n{fence}")
    click.echo(f"{findings}\n{fence}")
    click.get_current_context().exit(1)
