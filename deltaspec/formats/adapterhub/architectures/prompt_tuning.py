"""AdapterHub's prompt tuning."""

from __future__ import annotations

from deltaspec.formats.adapterhub.adapter import Adapter
from deltaspec.formats.options import Options


def read(adapter: Adapter, options: Options, part: str) -> None:
    """Refuse it: its rows go behind the embeddings, without positions and their LayerNorm."""
    options.ignore("prompt_length", "prompt_init", "prompt_init_text", "combine")
    adapter.unsupported("prompt tuning", "AdapterHub puts its rows in front of what leaves all embeddings, without "
                        "positions and LayerNorm, and soft_prompt puts them in front of the words",
                        "train a soft_prompt, or use prefix tuning")  # fmt: skip
    for keys in adapter.modules("prompt_tunings").values():
        for key in keys.values():
            adapter.take(key, "refused")
