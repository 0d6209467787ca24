"""A plugin of vLLM: it serves a folder of adapters by name or by content, each checked before it is loaded.

`DELTASPEC_LIBRARY` names the folder; without it, the plugin does nothing. `DELTASPEC_MAX_LORA_RANK` says which
`--max-lora-rank` the server was started with, where that is not vLLM's default. vLLM asks resolvers at all only under
`VLLM_ALLOW_RUNTIME_LORA_UPDATING=1`.
"""

from __future__ import annotations

import os


def register() -> None:
    """Register the resolver, in each of vLLM's processes. Raises ValueError for a folder that is not there."""
    from vllm.lora.resolver import LoRAResolverRegistry

    from deltaspec_vllm.resolver import Resolver
    from deltaspec_vllm.shelf import Shelf

    if folder := os.environ.get("DELTASPEC_LIBRARY"):
        rank = os.environ.get("DELTASPEC_MAX_LORA_RANK")
        LoRAResolverRegistry.register_resolver("deltaspec", Resolver(Shelf(folder, int(rank) if rank else None)))
