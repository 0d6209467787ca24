"""What is said of default targets, where other libraries mean other modules by theirs."""

from __future__ import annotations

from collections.abc import Iterable

from deltaspec.backbone.table import ModuleTable


def cross_attention_note(roles: Iterable[str], table: ModuleTable) -> list[str]:
    """Say that default roles leave out the cross-attention that a model has: names such as `q`, PEFT's, take it in."""
    roles, here = tuple(roles), {role for row in table.rows for role in row.roles}
    out = [f"cross_{role}" for role in roles if role.startswith("attn.")]
    out = [role for role in out if role in here and role not in roles]
    if not out:
        return []
    with_it = ", ".join([*(role for role in roles if role in here), *out])
    text = f"its default target leaves cross-attention out, which PEFT's takes in: target: {{role: [{with_it}]}}"
    return [text]
