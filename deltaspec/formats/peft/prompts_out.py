"""Writing what PEFT's prompt types share: one table of rows in front of what a model is given."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from deltaspec.formats.outgoing import Outgoing, Part
from deltaspec.formats.peft.prompts import KEY
from deltaspec.formats.peft.task import task
from deltaspec.methods.registry import methods

LONE = "write it by itself: c.save_as('peft', …, its name)"
_TASKS = ("CAUSAL_LM", "SEQ_2_SEQ_LM")


def lone(out: Outgoing, parts: list[Part]) -> str | None:
    """Return why PEFT has no place for a prompt together with what else is there; None where it has."""
    if len({part.delta for part in parts}) > 1 or out.parts:
        return "PEFT's prompts stand alone, and other deltas are here"
    if parts[0].strength != 1:
        return f"strength {parts[0].strength:g} has no place in PEFT's prompts"
    if task(out) not in _TASKS:
        return f"PEFT's prompts are for language models, not {type(out.base.model).__name__}"
    return None


def simplified(part: Part) -> Mapping[str, Tensor]:
    """Return a part's tensors without what only its training needed."""
    method = methods()[part.method]
    if method.simpler(part.params) is not None:
        return method.simplified(part.at.site, part.params, part.own)
    return {spec.name: getattr(part.own, spec.name) for spec in part.at.tensors}


def write_table(out: Outgoing, kind: str, table: Tensor, *, tokens: int, width: int, stacks: int, **more: Any) -> None:
    """Write the table of a prompt type, and what PEFT wants to know of the model."""
    config: Any = out.base.config.get_text_config(decoder=True)
    out.tensors[KEY] = table
    out.config |= {
        "peft_type": kind,
        "num_virtual_tokens": tokens,
        "token_dim": width,
        "num_transformer_submodules": stacks,
        "num_attention_heads": config.num_attention_heads,
        "num_layers": config.num_hidden_layers,
        **more,
    }
