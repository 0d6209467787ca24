"""The task that PEFT says a base model's class is for."""

from __future__ import annotations

from deltaspec.formats.outgoing import Outgoing

_TASKS = {
    "ForCausalLM": "CAUSAL_LM",
    "LMHeadModel": "CAUSAL_LM",
    "ForConditionalGeneration": "SEQ_2_SEQ_LM",
}
"""Tasks by the ends of names of classes. Those whose PEFT classes look for a trained head are not among them."""


_READING = {
    "ForSequenceClassification": "SEQ_CLS",
    "ForTokenClassification": "TOKEN_CLS",
    "ForQuestionAnswering": "QUESTION_ANS",
}
"""Tasks whose PEFT classes save a head."""


def task(out: Outgoing) -> str | None:
    """Return PEFT's task type for the base's class; None where PEFT's class for it would want more than there is."""
    kind = type(out.base.model).__name__
    found = next((named for end, named in _TASKS.items() if kind.endswith(end)), None)
    encoder_decoder = bool(getattr(out.base.config, "is_encoder_decoder", False))
    return found if (found == "SEQ_2_SEQ_LM") == encoder_decoder else None


def prompt_task(out: Outgoing) -> str | None:
    """Return the task type with which PEFT puts a prompt in front of a model of the base's class; None: there is none.

    An encoder with a decoder has one as a language model alone.
    """
    if (found := task(out)) is not None:
        return found
    model = out.base.model
    if getattr(out.base.config, "is_encoder_decoder", False):
        return None
    if getattr(model, "base_model", None) is model:
        return "FEATURE_EXTRACTION"
    return next((named for end, named in _READING.items() if type(model).__name__.endswith(end)), None)
