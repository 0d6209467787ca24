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
from deltaspec.language.conditions import from_text
from deltaspec.language.validate import validate

if TYPE_CHECKING:
    from torch import nn

    from deltaspec.costs.estimate import Estimate
    from deltaspec.language.conditions import Conditions
    from deltaspec.planning.plan import Plan


@click.command(cls=Verb)
@click.argument("model")
@click.argument("specs", nargs=-1, required=True, metavar="SPEC...")
@click.option("--check", is_flag=True, help="Compare with the locks beside the specs instead of printing the plan.")
@click.option(
    "--estimate",
    "asked",
    metavar="KEY=VALUE,...",
    help="Say what a step of training takes, too: batch=8,length=512,optimizer=adamw. No weight is loaded.",
)
@output_format(*FORMATS, "markdown", what="The plan and findings")
def command(model: str, specs: tuple[str, ...], check: bool, asked: str | None, output_format: str) -> None:
    """Return what specs do to MODEL: sites, tensors, counts, expectations.

    MODEL is a directory or config.json of Hugging Face, a hub id, or package.module:factory. No weights are needed.
    Exit codes: 0 planned (or, with --check, locked), 1 findings, 2 usage.
    """
    if check and asked is not None:
        raise click.UsageError("--check compares and --estimate prints: give one of the two")
    try:
        conditions = None if asked is None else from_text(asked)
        built, planned = _planned(model, specs)
        estimate = None if conditions is None else _estimated(built, planned, conditions)
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
        if estimate is not None:
            say(f"\n{estimate}")
    elif output_format == "json":
        more = {} if estimate is None else {"estimate": estimate.to_dict()}
        click.echo(json.dumps(clean_data(planned.to_dict() | more), indent=2))
    elif output_format == "markdown":
        from deltaspec.planning.text import markdown

        click.echo(markdown(planned) + ("" if estimate is None else f"\n\n{estimate.markdown()}"))
    else:
        show([], output_format)


def plan_from(model: str, specs: tuple[str, ...]) -> Plan:
    """Plan specs on a model, both as the command line names them."""
    return _planned(model, specs)[1]


def _planned(model: str, specs: tuple[str, ...]) -> tuple[nn.Module, Plan]:
    """Return the model and the plan. The specs are read first: that is quick."""
    if findings := [finding for spec in specs for finding in validate(spec)]:
        raise DeltaSpecError(findings)
    from deltaspec.backbone.loading import model_from
    from deltaspec.compiler.estimate import plan

    with apart():
        built = model_from(model)
        return built, plan(built, *specs)


def _estimated(model: nn.Module, planned: Plan, conditions: Conditions) -> Estimate:
    from deltaspec.compiler.estimate import estimate_plan

    with apart():
        return estimate_plan(model, planned, conditions, report=_option)


def _option(key: str, message: str, hint: str) -> Diagnostic:
    return Diagnostic("DS506", message, f"--estimate: {key}", suggestion=hint)


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
