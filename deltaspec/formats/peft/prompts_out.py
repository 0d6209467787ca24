"""Writing what PEFT's prompt types share: one table of rows in front of what a model is given, and heads beside it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from deltaspec.formats.outgoing import Outgoing, Part
from deltaspec.formats.peft.aside import PREFIX, WHOLE, write_whole
from deltaspec.formats.peft.naming import saved_by
from deltaspec.formats.peft.prompts import KEY
from deltaspec.formats.peft.task import prompt_task
from deltaspec.methods.registry import methods

LONE = "write it by itself: c.save_as('peft', …, its name)"
_HEADS = {"SEQ_CLS": ("classifier", "score"), "TOKEN_CLS": ("classifier", "score"), "QUESTION_ANS": ("qa_outputs",)}
"""Modules that PEFT saves of models for a task, trained or not: whatever ends with one of these names."""
_PREFIX = "base_model."


def lone(out: Outgoing, parts: list[Part]) -> str | None:
    """Return why PEFT has no place for a prompt together with what else is there; None where it has."""
    if len({part.delta for part in parts}) > 1 or any(part.method not in WHOLE for part in out.parts):
        return "PEFT's prompts stand alone but for modules trained in full, and other deltas are here"
    if parts[0].strength != 1:
        return f"strength {parts[0].strength:g} has no place in PEFT's prompts"
    if (found := prompt_task(out)) is None:
        return f"PEFT has no task for {type(out.base.model).__name__}, and runs a model of none without its prompt"
    if found in _HEADS and not _heads(out, found):
        return f"PEFT looks for a head of one of the names {', '.join(_HEADS[found])}, and there is none here"
    return None


def _heads(out: Outgoing, of: str) -> list[str]:
    """Return the modules that PEFT saves for a task, whatever was trained."""
    return saved_by(_HEADS.get(of, ()), (name for name, _ in out.base.model.named_modules(remove_duplicate=False)))


def simplified(part: Part) -> Mapping[str, Tensor]:
    """Return a part's tensors without what only its training needed."""
    method = methods()[part.method]
    if method.simpler(part.params) is not None:
        return method.simplified(part.at.site, part.params, part.own)
    return {spec.name: getattr(part.own, spec.name) for spec in part.at.tensors}


def write_table(out: Outgoing, kind: str, table: Tensor, *, tokens: int, width: int, stacks: int, **more: Any) -> None:
    """Write the table of a prompt type, and what PEFT wants to know of the model."""
    config: Any = out.base.config.get_text_config(decoder=True)
    of = prompt_task(out)
    assert of is not None
    write_whole(out, _heads(out, of))
    out.tensors = {_PREFIX + key.removeprefix(PREFIX): value for key, value in out.tensors.items()}
    if of in _HEADS:
        out.config["modules_to_save"] = sorted({*out.config["modules_to_save"], *_HEADS[of]})
    out.tensors[KEY] = table
    out.config |= {
        "task_type": of,
        "auto_mapping": None,
        "peft_type": kind,
        "num_virtual_tokens": tokens,
        "token_dim": width,
        "num_transformer_submodules": stacks,
        "num_attention_heads": config.num_attention_heads,
        "num_layers": config.num_hidden_layers,
        **more,
    }
