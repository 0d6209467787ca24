"""The way out for methods that an engine does not read: what an export or a merge can do with them."""

from __future__ import annotations

from functools import cache

from deltaspec.engines.vocabulary import AS_LORA, SERVE
from deltaspec.formats.peft.reader import known_types, type_module
from deltaspec.language.checks.translation import our_name
from deltaspec.methods.registry import methods


def way_out(peft_type: str) -> str | None:
    """Return what can be done with a method, by PEFT's name; None where that is what can be done with any."""
    name = our_name(peft_type)
    if name in _low_rank():
        return AS_LORA
    method = methods().get(name)
    return SERVE if method is not None and method.promises.weight is None else None


@cache
def _low_rank() -> frozenset[str]:
    """Return our methods that are low-rank updates, so that an export writes them as LoRA exactly."""
    kinds = [type_module(name) for name in known_types()]
    return frozenset(method for kind in kinds if hasattr(kind, "updates") for method in kind.METHODS)
