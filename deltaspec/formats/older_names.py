"""Modules that a later transformers calls otherwise than the one an adapter was saved with."""

from __future__ import annotations

import re

_RENAMED: dict[str, tuple[tuple[str, str], ...]] = {
    "vit": (
        (r"\bencoder\.layer\.(\d+)\.attention\.attention\.query\b", r"layers.\1.attention.q_proj"),
        (r"\bencoder\.layer\.(\d+)\.attention\.attention\.key\b", r"layers.\1.attention.k_proj"),
        (r"\bencoder\.layer\.(\d+)\.attention\.attention\.value\b", r"layers.\1.attention.v_proj"),
        (r"\bencoder\.layer\.(\d+)\.attention\.output\.dense\b", r"layers.\1.attention.o_proj"),
        (r"\bencoder\.layer\.(\d+)\.attention\.attention\b", r"layers.\1.attention"),
        (r"\bencoder\.layer\.(\d+)\.intermediate\.dense\b", r"layers.\1.mlp.fc1"),
        (r"\bencoder\.layer\.(\d+)\.output\.dense\b", r"layers.\1.mlp.fc2"),
        (r"\bencoder\.layer\.(\d+)\b", r"layers.\1"),
    ),
}
"""By model type: names up to transformers 4, and what they are from 5 on; the first that is found is taken."""


def of_today(module: str, model_type: str | None) -> str:
    """Return what a module of a model of this type is called today."""
    for old, new in _RENAMED.get(model_type or "", ()):
        renamed, count = re.subn(old, new, module)
        if count:
            return renamed
    return module
