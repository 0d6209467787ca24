"""The verb `explain`: why each delta of a spec does or does not change one module."""

from __future__ import annotations

import click

from deltaspec.backbone.table import Row
from deltaspec.cli._params import Verb
from deltaspec.cli._shared import apart, say
from deltaspec.diagnostics.clean import clean


@click.command(cls=Verb)
@click.argument("model")
@click.argument("spec")
@click.argument("name", metavar="FQN")
def command(model: str, spec: str, name: str) -> None:
    """Return why each delta of SPEC does or does not change the module FQN of MODEL, condition by condition.

    Exit codes: 0 explained, 1 the spec is invalid or there is no such module, 2 usage.
    """
    from deltaspec.language.load import load

    loaded = load(spec)  # before torch is: that is quick
    from deltaspec.backbone.loading import model_from
    from deltaspec.backbone.observations import Observations
    from deltaspec.backbone.tabulate import tabulate
    from deltaspec.reports.verdicts import find_row, verdicts

    with apart():
        backbone = model_from(model)
        table = tabulate(backbone)
    row = find_row(table, name)
    say(_title(row), bold=True)
    for verdict in verdicts(loaded, table, Observations(backbone), row):
        style = "green" if verdict.taken else "yellow"
        say(f"\n{verdict.delta} ({verdict.method}): {clean(verdict.outcome)}", fg=style)
        say(f"  {clean(verdict.location)}")
        for reason, place in verdict.reasons:
            say(f"    {'✓' if reason.accepted else '✗'} {clean(str(reason))}  ({clean(place)})")


def _title(row: Row) -> str:
    facts = [row.type]
    if row.in_features is not None:
        facts.append(f"{row.in_features} → {row.out_features}")
    if row.roles:
        facts.append(f"roles {', '.join(row.roles)}")
    if row.layer is not None:
        facts.append(f"layer {row.layer} of {row.stack}")
    return clean(f"{row.fqn or '(the model itself)'}: {', '.join(facts)}")
