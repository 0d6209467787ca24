"""Prompt tuning of PEFT: embeddings in front of the input."""

from __future__ import annotations

from typing import TYPE_CHECKING

from deltaspec.formats.outgoing import Outgoing, Part
from deltaspec.formats.peft.prompts import add_soft_prompt, classifier_reads
from deltaspec.formats.peft.prompts_out import LONE, lone, simplified, write_table
from deltaspec.formats.peft.task import prompt_task

if TYPE_CHECKING:
    from deltaspec.formats.peft.adapter import Adapter

METHODS = frozenset({"soft_prompt", "p_tuning"})
"""Methods that are written so: of p-tuning, what its encoder gives."""
_START = ("prompt_tuning_init_text", "tokenizer_name_or_path", "tokenizer_kwargs")
"""Options that say what the embeddings were before they were trained."""


def read(adapter: Adapter) -> None:
    """Add the delta of a prompt tuning adapter."""
    adapter.ignore(*_START)
    adapter.options.word("prompt_tuning_init", "RANDOM", ("TEXT", "SAMPLE_VOCAB", "RANDOM"))
    add_soft_prompt(adapter)


def write(out: Outgoing) -> None:
    """Write a prompt, whatever it was trained by."""
    parts = [part for own in out.take(lambda part: part.method in METHODS).values() for part in own]
    if reason := lone(out, parts) or _elsewhere(out, parts[0]):
        out.refuse(parts, reason, LONE)
        return
    if reason := _read_elsewhere(out, parts[0]):
        out.refuse(parts, reason)
        return
    part = parts[0]
    if part.params.place != "front":
        out.remarks.append("PEFT puts the prompt in front of padding on the left, deltaspec behind it: rows that are "
                           "padded there differ")  # fmt: skip
    if part.params.output != "all" and prompt_task(out) != "SEQ_CLS":
        out.remarks.append("what PEFT gives has the positions of the prompt in front of the input's")
    prompt = simplified(part)["prompt"]
    write_table(out, "PROMPT_TUNING", prompt, tokens=prompt.shape[0], width=prompt.shape[1], stacks=1)
    out.config["prompt_tuning_init"] = "RANDOM"


def _elsewhere(out: Outgoing, part: Part) -> str | None:
    """Return why PEFT would put a prompt elsewhere; None where it is the embedding that PEFT stands in front of."""
    entrances = [row for row in out.base.table.rows if row.entrance is not None and row.entrance.problem is None]
    names = [row.fqn for row in entrances if row.vocabulary] or [row.fqn for row in entrances]
    return None if names[:1] == [part.fqn] else f"PEFT puts no prompt in front of {part.fqn}"


def _read_elsewhere(out: Outgoing, part: Part) -> str | None:
    """Return why PEFT's classifier would read another position; None where it reads what is read here."""
    if prompt_task(out) != "SEQ_CLS":
        return None
    reads, output = classifier_reads(out.base, part.at.site.row), part.params.output
    if reads == "mean":
        return "PEFT's classifier averages over the prompt's positions, too"
    if reads == "first" and output != "all":
        return "PEFT's classifier reads the prompt's first position, and here the input's (output: tokens)"
    if reads == "last":
        if output == "all":
            return "PEFT's classifier reads the last position (output: tokens)"
        out.remarks.append("PEFT's classifier reads the last column of each row: rows padded on the right differ")
    return None
