"""What a PEFT configuration says of the base model: its name, and the task that its class is for."""

from __future__ import annotations

from typing import Any

from torch import nn

from deltaspec.formats.outgoing import Outgoing

_TASKS = {
    "ForCausalLM": "CAUSAL_LM",
    "LMHeadModel": "CAUSAL_LM",
    "ForConditionalGeneration": "SEQ_2_SEQ_LM",
}
"""Tasks by the ends of names of classes. Those whose PEFT classes look for a trained head are not among them."""


def task(out: Outgoing) -> str | None:
    """Return PEFT's task type for the base's class; None where PEFT's class for it would want more than there is."""
    kind = type(out.base.model).__name__
    found = next((named for end, named in _TASKS.items() if kind.endswith(end)), None)
    encoder_decoder = bool(getattr(out.base.config, "is_encoder_decoder", False))
    return found if (found == "SEQ_2_SEQ_LM") == encoder_decoder else None


def base_of(model: nn.Module) -> tuple[str | None, str | None]:
    """Return the id or path that a model was loaded from, and its revision, as far as it says so."""
    config: Any = getattr(model, "config", None)
    named = getattr(model, "name_or_path", None) or getattr(config, "_name_or_path", None)
    revision = getattr(config, "_commit_hash", None)
    return (str(named) if named else None), (str(revision) if named and revision else None)
