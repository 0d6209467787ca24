"""The model card beside saved deltas: what they are, the model they belong to, and how they get onto it."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from pathlib import Path

from deltaspec.diagnostics.clean import clean
from deltaspec.documents.atomic import write_atomically
from deltaspec.planning.plan import Plan

CARD = "README.md"
_OURS = "<!-- written by deltaspec -->"
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?", re.ASCII)


def write_card(folder: Path, plan: Plan, kind: type, base: str | None, notes: Sequence[str] = ()) -> None:
    """Write the card of the deltas of a plan, unless there is one that somebody else wrote.

    `kind` is the model's class, `base` the name or path that the model was loaded from; `notes` are further lines.
    """
    path = folder / CARD
    if path.exists() and _OURS not in path.read_text(encoding="utf-8", errors="replace"):
        return
    write_atomically(path, card(plan, kind, base, notes).encode())


def on_hub(base: str | None) -> bool:
    """Return whether the name of a base model is an id on a hub, and no path here."""
    return base is not None and _HUB_ID.fullmatch(base) is not None and not os.path.exists(base)


def card(plan: Plan, kind: type, base: str | None, notes: Sequence[str] = ()) -> str:
    """Return a card as Markdown, with the metadata that hubs read."""
    methods = list(dict.fromkeys(delta.method for delta in plan.deltas))
    named = [f"- `{delta.name}`: {delta.method}, {delta.trainable:,} parameters" for delta in plan.deltas]
    where = json.dumps(clean(base), ensure_ascii=False) if base else "..."
    maker = f"{kind.__name__}.from_pretrained" if hasattr(kind, "from_pretrained") else kind.__name__
    return "\n".join([
        "---", "library_name: deltaspec", *([f"base_model: {base}"] if on_hub(base) else []),
        f"tags: [{', '.join(('deltaspec', *methods))}]", "---", _OURS, "",
        f"# Deltas for {kind.__name__}", "",
        "This directory holds deltas, not a model: a base model alone computes without what was trained.", "",
        *named, "", "Put them onto the base model:", "",
        "```python", "import deltaspec", f"from {kind.__module__.partition('.')[0]} import {kind.__name__}", "",
        f"model = {maker}({where})  # the model that they were trained on",
        'compiled = deltaspec.restore(model, "this directory")', "```", "",
        "`compiled.merge()` is a plain model with the deltas in its weights; its `save_pretrained` saves it whole.", "",
        *([*notes, ""] if notes else []),
    ])  # fmt: skip
