"""The command line: `deltaspec VERB`. Each file of this package is a verb, and only the one asked for is imported.

Reads arguments and prints; decides nothing.

Results go to standard output, all else to standard error. Exit codes: 0 clean, 1 findings, 2 usage or internal error,
130 interrupted.
"""

from __future__ import annotations

import io
import pkgutil
import sys
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any

import click

from deltaspec.cli._shared import say, show
from deltaspec.diagnostics.clean import clean
from deltaspec.diagnostics.findings import DeltaSpecError
from deltaspec.diagnostics.wording import closest

_EXTRAS = {"torch": "torch", "safetensors": "torch", "transformers": "transformers"}
"""Packages that an installation for `validate` alone lacks, with the extra that has each."""


_INTERRUPTED = 130
"""What shells give for a command that Ctrl-C ended."""


@contextmanager
def _notes() -> Iterator[None]:
    """Print warnings as notes, at the end; those of libraries about their own future are for who calls them."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("ignore", FutureWarning)
        try:
            yield
        finally:
            for warning in caught:
                say(f"note: {warning.message}", err=True)


class _Verbs(click.Group):
    """Finds the verbs by itself: modules here that do not start with `_`, each with a click command named `command`."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted(info.name for info in pkgutil.iter_modules(__path__) if not info.name.startswith("_"))

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in self.list_commands(ctx):
            return None
        command = import_module(f"{__name__}.{cmd_name}").command
        assert isinstance(command, click.Command)
        command.name = cmd_name
        return command

    def resolve_command(self, ctx: click.Context, args: list[str]) -> Any:
        known = self.list_commands(ctx)
        if args and not args[0].startswith("-") and args[0] not in known and (near := closest(args[0], known)):
            ctx.fail(f"No such command {args[0]!r}. Did you mean {near!r}?")
        return super().resolve_command(ctx, args)

    def invoke(self, ctx: click.Context) -> Any:
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, io.TextIOWrapper):
                stream.reconfigure(errors="backslashreplace")  # a terminal without UTF-8 still gets the findings
        try:
            with _notes():
                return super().invoke(ctx)
        except KeyboardInterrupt:
            say("deltaspec: interrupted", err=True)
            ctx.exit(_INTERRUPTED)
        except DeltaSpecError as error:
            show(error.diagnostics)
            ctx.exit(1)
        except click.UsageError as error:
            if (text := clean(error.format_message())) != error.format_message():
                raise click.UsageError(text, error.ctx) from None
            raise
        except (click.exceptions.Exit, click.ClickException, click.Abort, BrokenPipeError):
            raise
        except Exception as error:  # whatever it is, exit 1 is for findings
            lacking = (error.name or "").partition(".")[0] if isinstance(error, ModuleNotFoundError) else ""
            if lacking in _EXTRAS:
                hint = f"pip install 'deltaspec[{_EXTRAS[lacking]}]'"
                ctx.fail(f"{ctx.invoked_subcommand} needs {lacking}: {hint}")
            say(traceback.format_exc().rstrip(), err=True)
            click.echo("deltaspec: internal error: please report it with the lines above", err=True)
            ctx.exit(2)


def _version(ctx: click.Context, _: click.Parameter, value: bool) -> None:
    if value and not ctx.resilient_parsing:
        import deltaspec

        click.echo(f"deltaspec {deltaspec.__version__}")
        ctx.exit()


@click.group(cls=_Verbs, context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--version", is_flag=True, expose_value=False, is_eager=True, callback=_version, help="Show the version.")
def main() -> None:
    """Validate, plan and compile DeltaSpecs.

    Exit codes: 0 clean, 1 findings, 2 usage or internal error, 130 interrupted.
    """
