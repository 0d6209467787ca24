"""The verb `demo`: train, swap, detach, save and reload two deltas on one real pretrained model."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from deltaspec.cli._params import Verb
from deltaspec.cli._shared import say

QUICK_TRAIN, QUICK_TEST = 96, 128


@click.command(cls=Verb)
@click.option(
    "--output", type=click.Path(file_okay=False, path_type=Path), default=Path("demo-output"), show_default=True
)
@click.option("--quick", is_flag=True, help="Few texts and steps: every step runs, the accuracies mean little.")
@click.option("--reload", is_flag=True, hidden=True, help="Only reload what an earlier run saved, and check it.")
def command(output: Path, quick: bool, reload: bool) -> None:
    """Show a spec at work on a real model, on two labelled tasks.

    Trains a LoRA delta and an adapter on MiniLM-L6 (a few minutes on two cores), compares them with each other and with
    the untouched backbone, detaches them, and reloads them in a new process.
    """
    try:
        from rich.console import Console
        from transformers.utils import logging

        from deltaspec.demo import data, story
    except ModuleNotFoundError as error:
        raise click.UsageError(f"the demo needs {error.name}: pip install 'deltaspec[demo]', or make demo") from None
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    console = Console()
    try:
        tasks = (data.tweets(), data.topics())
        if reload:
            story.reload(console, output, tasks)
            return
        output.mkdir(parents=True, exist_ok=True)
        story.run(console, output, tuple(task.cut(QUICK_TRAIN, QUICK_TEST) for task in tasks) if quick else tasks)
    except data.MissingPackage as error:
        raise click.UsageError(str(error)) from None
    except story.DemoFailed as error:
        say(f"error: {error}", err=True)
        sys.exit(1)
