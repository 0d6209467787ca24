"""The task that PEFT says a base model's class is for."""

from __future__ import annotations

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
