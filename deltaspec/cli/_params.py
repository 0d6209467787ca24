"""What the arguments of verbs may be: nothing empty, one of some words, an engine; and how results are written."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import click

from deltaspec.cli._shared import show
from deltaspec.diagnostics.findings import DeltaSpecError
from deltaspec.diagnostics.render import FORMATS
from deltaspec.diagnostics.wording import closest
from deltaspec.engines import known

_RULES = (".yaml", ".yml", ".json")
"""How the name of a file of rules ends."""


class Verb(click.Command):
    """A verb: what it is given is not empty, and findings are written in the format that it is asked for."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        rest = super().parse_args(ctx, args)
        for param in self.params:
            value = ctx.params.get(param.name or "")
            if value == "" or (isinstance(value, tuple) and "" in value):
                raise click.BadParameter("it is empty", ctx, param)
        return rest

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except DeltaSpecError as error:
            chosen = ctx.params.get("output_format", "text")
            show(error.diagnostics, chosen if chosen in FORMATS else "text")
            ctx.exit(1)


class OneOf(click.ParamType[str]):
    """One of some words, or what else `takes` accepts; a misspelling is told from which."""

    name = "word"

    def __init__(
        self, words: Callable[[], Iterable[str]], more: str = "", takes: Callable[[str], bool] = lambda _: False
    ) -> None:
        self._words, self._more, self._takes = words, more, takes

    def get_metavar(self, param: click.Parameter, ctx: click.Context) -> str:
        return f"[{'|'.join((*self._words(), *filter(None, [self._more])))}]"

    def convert(self, value: str, param: click.Parameter | None, ctx: click.Context | None) -> str:
        words = tuple(self._words())
        if value in words or self._takes(value):
            return value
        near = closest(value, words)
        hint = f": did you mean {near!r}?" if near else ""
        known = ", ".join((*words, *filter(None, [self._more])))
        self.fail(f"{value!r} is not one of {known}{hint}", param, ctx)


ENGINE = OneOf(known, "FILE.yaml", lambda value: value.endswith(_RULES))
"""A name among the files of rules, or a file of rules of one's own."""
MATCH = OneOf(lambda: ("weights", "structure", "sites"))
"""How much of the base must be as it was when deltas were saved."""


def output_format(*formats: str, what: str = "The result and findings") -> Callable[[Any], Any]:
    """Return the option that says how a verb writes what it found."""
    words = formats or ("text", "json")
    return click.option(
        "--format", "output_format", type=OneOf(lambda: words), default="text", show_default=True,
        help=f"How {what[:1].lower()}{what[1:]} are written.",
    )  # fmt: skip
