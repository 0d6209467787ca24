"""The model card of a PEFT adapter, with the metadata that hubs read and what a reader must know."""

from __future__ import annotations

import json
from typing import Any

from deltaspec.diagnostics.clean import clean
from deltaspec.formats.outgoing import Outgoing
from deltaspec.storage.card import on_hub


def card(out: Outgoing, config: dict[str, Any]) -> str:
    """Return the card as Markdown."""
    base, revision = config["base_model_name_or_path"], config["revision"]
    known = on_hub(base)
    kind = type(out.base.model).__name__
    methods = list(dict.fromkeys(part.method for part in out.all_parts))
    tags = [*([f"base_model:adapter:{base}"] if known else []), str(config["peft_type"]).lower(), "deltaspec", *methods]
    named = json.dumps(clean(base), ensure_ascii=False) if base else "..."
    at = f", revision={json.dumps(revision)}" if revision else ""
    strong = {name: f" at strength {s:g}" for name, s in out.strengths.items() if s != 1}
    deltas = [f"- `{name}`: {out.plan[name].method}{strong.get(name, '')}" for name in out.strengths]
    errors = [f"- `{fqn}`: {error:.2e}" for fqn, error in out.errors.items()]
    close = ["", f"Updates of rank {out.wishes.approximate} stand for what has no exact form. Relative errors of the "
             "changes of weights (Frobenius):", "", *errors] if errors else []  # fmt: skip
    remarks = ["", "What a reader must know:", "", *(f"- {remark}" for remark in out.remarks)] if out.remarks else []
    return "\n".join([
        "---", *([f"base_model: {base}"] if known else []), "library_name: peft",
        "tags:", *(f"- {json.dumps(tag)}" for tag in dict.fromkeys(tags)), "---", "",
        f"# A PEFT adapter for {kind}", "",
        "Written by deltaspec; the spec and the lock of each delta lie beside it:", "",
        *deltas, *close, *remarks, "",
        "```python", "from peft import PeftModel", f"from transformers import {kind}", "",
        f"model = {kind}.from_pretrained({named}{at})  # the model that it was trained on",
        'model = PeftModel.from_pretrained(model, "this directory")', "```", "",
    ])  # fmt: skip
