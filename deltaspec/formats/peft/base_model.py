"""The base model that a PEFT directory names: PEFT wraps the class of the adapter's task."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from deltaspec.backbone.loading import Wanted
from deltaspec.formats.options import Options
from deltaspec.formats.peft.adapter import CONFIG, WEIGHTS
from deltaspec.formats.peft.words import TASKS
from deltaspec.formats.saved_base import HEADS
from deltaspec.formats.unread import Unread


def base_named_in(folder: Path) -> tuple[str | None, Wanted]:
    """Return the reference of the base model, and its class with as many labels as a saved head has.

    Raises DeltaSpecError.
    """
    unread = Unread(folder)
    options = Options(unread, _given(unread.json(CONFIG)), CONFIG)
    kind = TASKS.get(options.word("task_type", "", TASKS))
    mapped = Options(unread, _given(options.mapping("auto_mapping")), CONFIG)
    if kind is None and mapped.text("parent_library", "").startswith("transformers."):
        kind = mapped.text("base_model_class", "") or None
    named = options.text("base_model_name_or_path", "")
    settings = {}
    if kind in (TASKS["SEQ_CLS"], TASKS["TOKEN_CLS"]):
        for file in (file for file in WEIGHTS if (folder / file).exists()):
            heads = [header.shape for key, header in unread.headers(file).items() if key.endswith(HEADS)]
            if heads and len(heads[-1]) != 2:
                message = f"its head has the shape {list(heads[-1])}, where ?×? is due"
                unread.find("DS526", message, "the file was changed: save the adapter again", file)
            elif heads:
                settings = {"num_labels": heads[-1][0]}
            break
    unread.settle()
    return named or None, Wanted(kind, settings)


def _given(config: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in config.items() if value is not None}
