"""The base model that a PEFT directory names: PEFT wraps the class of the adapter's task."""

from __future__ import annotations

from pathlib import Path

from deltaspec.backbone.loading import Wanted
from deltaspec.formats.peft.adapter import CONFIG, WEIGHTS
from deltaspec.formats.unread import Unread

_KINDS = {
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
    "FEATURE_EXTRACTION": "AutoModel",
}
_HEADS = ("classifier.weight", "score.weight", "classifier.out_proj.weight", "classification_head.out_proj.weight")


def base_named_in(folder: Path) -> tuple[str | None, Wanted]:
    """Return the reference of the base model, and its class with as many labels as a saved head has."""
    unread = Unread(folder)
    config = unread.json(CONFIG)
    named = config.get("base_model_name_or_path")
    mapping = config.get("auto_mapping")
    kind = _KINDS.get(str(config.get("task_type")))
    if kind is None and isinstance(mapping, dict) and str(mapping.get("parent_library")).startswith("transformers."):
        kind = mapping.get("base_model_class")
    settings = {}
    if kind in (_KINDS["SEQ_CLS"], _KINDS["TOKEN_CLS"]):
        for file in (file for file in WEIGHTS if (folder / file).exists()):
            heads = [value for key, value in unread.tensors(file).items() if key.endswith(_HEADS)]
            settings = {"num_labels": heads[-1].shape[0]} if heads else {}
            break
    return (named if isinstance(named, str) and named else None), Wanted(kind, settings)
