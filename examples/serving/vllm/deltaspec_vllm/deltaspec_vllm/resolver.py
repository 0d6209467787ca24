"""vLLM's side: a name that no one loaded is looked up, and refused with the reasons or loaded."""

from __future__ import annotations

import asyncio

from vllm.exceptions import VLLMValidationError
from vllm.lora.request import LoRARequest
from vllm.lora.resolver import LoRAResolver

from deltaspec_vllm.shelf import Refused, Shelf


class Resolver(LoRAResolver):
    """Resolves names by a shelf of adapters."""

    def __init__(self, shelf: Shelf) -> None:
        self._shelf = shelf

    async def resolve_lora(self, base_model_name: str, lora_name: str) -> LoRARequest | None:
        """Return what to load; None, and so 404, for a name that is not there.

        Raises VLLMValidationError, and so answers 400 with all reasons, for an adapter that vLLM would get wrong. (Had
        vLLM refused it itself, the reason would be in its log alone.)
        """
        try:
            # Reading and checking takes a moment, in which the server answers others.
            folder = await asyncio.to_thread(self._shelf.find, lora_name, base_model_name)
        except Refused as refused:
            raise VLLMValidationError(str(refused), parameter="model") from refused
        return None if folder is None else LoRARequest(lora_name, 1, str(folder))  # the server gives it its number
