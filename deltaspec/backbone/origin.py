"""Where a model was loaded from, as transformers' configurations remember it."""

from __future__ import annotations

from torch import nn


def origin(backbone: nn.Module) -> dict[str, str]:
    """Return the name or path that a model, or the first model inside it, was loaded from, and its revision on a hub.

    Each is there only where it is known: `{"id": "org/name", "revision": "8a3f…"}`.
    """
    for module in backbone.modules():
        config = module.__dict__.get("config")
        if name := getattr(config, "_name_or_path", None):
            revision = getattr(config, "_commit_hash", None)
            return {"id": str(name), **({"revision": str(revision)} if revision else {})}
    return {}
