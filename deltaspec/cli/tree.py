"""The verb `tree`: a model with repeated layers folded, roles, counts, and the sites of a spec."""

from __future__ import annotations

import sys

import click

from deltaspec.cli._params import Verb
from deltaspec.cli._shared import apart, report, wants_color
from deltaspec.diagnostics.findings import Diagnostic


@click.command(cls=Verb)
@click.argument("model")
@click.option("--spec", "specs", multiple=True, metavar="FILE", help="Mark what the deltas of this spec select.")
@click.option("--depth", type=click.IntRange(min=0), help="Levels to show below the model.")
@click.option("--all", "everything", is_flag=True, help="Every module by itself, those without parameters too.")
def command(model: str, specs: tuple[str, ...], depth: int | None, everything: bool) -> None:
    """Print MODEL as a tree, with shapes, parameter counts and roles.

    MODEL is a directory with a config.json, a config.json, a hub id, or package.module:factory. Exit codes: 0 clean,
    1 findings in the spec or about the model, 2 usage error.
    """
    from rich.console import Console

    from deltaspec.backbone.loading import model_from
    from deltaspec.backbone.tabulate import tabulate
    from deltaspec.language.load import load
    from deltaspec.reports.tree import Mark, Tree, drawn, human, targets
    from deltaspec.selection.clock import timed

    loaded = [load(spec) for spec in specs]
    with apart():
        table = tabulate(model_from(model))
    marks: dict[str, list[Mark]] = {}
    findings: list[Diagnostic] = []
    counts: list[str] = []
    with timed():
        for spec, index, entry in [(each, *numbered) for each in loaded for numbered in enumerate(each.deltas)]:
            matches, wrong = targets(spec, index, table)
            findings += wrong
            counts.append(f"{entry.name}: {entry.method}, {len(matches)} selected")
            for match in matches:
                mark = Mark(entry.name, entry.method, len(counts) - 1, match.parameter)
                marks.setdefault(match.row.fqn, []).append(mark)
    lines = list(Tree(table, marks, depth, everything).lines())
    console = Console(no_color=not wants_color(), highlight=False, soft_wrap=True, markup=False, emoji=False)
    # A file or a pipe gets whole lines, whatever their width.
    console.print(drawn(lines, console.width if sys.stdout.isatty() else None))
    roles = f"roles of {', '.join(table.role_maps)}" if table.role_maps else "roles not known"
    console.print(f"{human(table.parameters)} parameters in {len(table.rows)} modules; {roles}")
    for line in counts:
        console.print(line)
    if findings:
        report(findings)
