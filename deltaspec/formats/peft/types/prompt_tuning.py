"""Prompt tuning of PEFT: embeddings in front of the input."""

from __future__ import annotations

from typing import TYPE_CHECKING

from deltaspec.formats.peft.prompts import add_soft_prompt

if TYPE_CHECKING:
    from deltaspec.formats.peft.adapter import Adapter

_START = ("prompt_tuning_init", "prompt_tuning_init_text", "tokenizer_name_or_path", "tokenizer_kwargs")
"""Options that say what the embeddings were before they were trained."""


def read(adapter: Adapter) -> None:
    """Add the delta of a prompt tuning adapter."""
    adapter.ignore(*_START)
    add_soft_prompt(adapter)
