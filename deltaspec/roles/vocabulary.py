"""The closed vocabulary of roles."""

from __future__ import annotations

ROLES: tuple[str, ...] = (
    "embed",
    "block",
    "attn",
    *(f"attn.{part}" for part in ("q", "k", "v", "o", "qkv")),
    "cross_attn",
    *(f"cross_attn.{part}" for part in ("q", "k", "v", "o", "kv", "qkv")),
    "mlp",
    *(f"mlp.{part}" for part in ("up", "gate", "down", "gate_up")),
    "norm",
    *(f"norm.{part}" for part in ("attn", "mlp", "final")),
    "expert",
    "head",
)
"""The closed vocabulary of roles."""
